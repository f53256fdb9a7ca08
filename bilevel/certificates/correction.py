"""The params of a bilevel problem moved to the inner minimiser by Newton's method."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.autodiff import Linearisation
from bilevel.certificates.matrix import applied, formed
from bilevel.linear.cg import CG
from bilevel.linear.gmres import GMRES
from bilevel.linear.operator import LinearResult, Operator
from bilevel.methods.implicit import transposed
from bilevel.methods.instance import Instance, OuterGradient
from bilevel.tree import Tree

SOLVED = 1e-3  # relative residual up to which a linear system counts as solved
SOUND = 0.1  # largest factor to which a sound correction takes the residual
BALANCING = 4  # products that balance a system of unknowns of unlike scale
ROUNDING = 256  # units that add up in R, and in a rule with moments before it stands still
ENOUGH = 1e-2  # factor from which a further step would pay no more
# What to do where there is no minimiser to compare with, as in training a network.
FAR = (
    "make more inner steps, or take certificate=AgainstSteps(), which judges the steps made, or "
    "check_hypergradient, which compares with differences"
)


@dataclass(frozen=True, eq=False)
class Point:
    """Derivatives at some params: J and C of the residual R, b and d of the outer objective.

    Attributes:
        instance: the problem.
        params: where.
        residual: R, linearised there.
        known: b and d there, if they were taken before.
        linearised: whatever was linearised on the way, for all points of one certificate.
    """

    instance: Instance
    params: Tree
    residual: Linearisation
    known: OuterGradient | None = None
    linearised: list[Linearisation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.linearised.append(self.residual)

    def moved(self, step: Tree) -> "Point":
        """The point at `params - step`."""
        params = tree.moved(self.params, step, 1.0)
        residual = self.instance.linearised(params)
        return Point(self.instance, params, residual, linearised=self.linearised)

    @cached_property
    def size(self) -> float:
        """Norm of R."""
        return tree.norm(self.residual.value)

    @cached_property
    def eps(self) -> float:
        """Rounding of the coarsest dtype of the params."""
        return eps_of(self.params)

    @property
    def rounding(self) -> float:
        """Norm of R that is no more than the rounding of the terms that cancel in it."""
        # Those are of the size of J theta: for quadratics R = J theta - c with c as large. Where
        # theta itself is flat, as under a symmetry of scale, J of another direction tells it.
        theta = tree.map_leaves(lambda x: x if tree.is_variable(x) else None, self.params)
        other = _random(theta)
        along, size = tree.norm(self.operator.apply(theta)), tree.norm(theta)
        across = ratio(tree.norm(self.operator.apply(other)), tree.norm(other)) * size
        return ROUNDING * self.eps * max(along, across if math.isfinite(across) else 0.0)

    @cached_property
    def outer(self) -> tuple[Tree, Tree]:
        """The gradients b and d in params and control."""
        found = self.known or self.instance.outer_gradient(self.params)
        return tree.filled(found.in_params, self.params), tree.filled(
            found.in_control, self.instance.control
        )

    @property
    def operator(self) -> Operator:
        """J."""
        found = self.transposed
        if found.adjoint is None:
            return found
        return replace(found, apply=found.adjoint, adjoint=found.apply)

    @cached_property
    def transposed(self) -> Operator:
        """The adjoint of J."""
        products = transposed(self.residual, self.instance)
        if self.matrix is None:
            return products
        return applied(self.matrix, self.residual.value, symmetric=products.symmetric)

    @cached_property
    def matrix(self) -> Tensor | None:
        """The adjoint of J on flat vectors, where it is small."""
        products = transposed(self.residual, self.instance)
        return formed(self.residual, products, self.residual.value)

    def mixed(self, vector: Tree) -> Tree:
        """The adjoint of C, applied to a vector."""
        return tree.filled(self.residual.pull(vector, 1), self.instance.control)

    def coupling(self, start: Tree) -> tuple[float, Tree]:
        """C applied to C^* and a vector, by a power iteration: its norm, and C^* of it."""
        # The ratio of the norms of the two, whole or by leaf, is that of C from below.
        # C is also the adjoint of the derivative of grad_alpha f in the params, up to a factor
        # where R is one times grad f: so no third derivative is taken where R is a gradient.
        symmetric = self.instance.residual_is_gradient
        in_control = self._in_control() if symmetric else self.residual
        scale = 1 / (tree.norm(start) or 1.0)
        unit = tree.map_leaves(lambda x: None if x is None else x * scale, start)
        along = in_control.pull(unit, 0) if symmetric else in_control.push(unit, 1)
        along = tree.filled(along, self.params)
        return tree.norm(along), self.mixed(along)

    def _in_control(self) -> Linearisation:
        """The gradient of the inner objective in the control, in both arguments."""
        instance = self.instance
        batch = instance.judging_batch
        found = Linearisation(
            lambda params, control: autodiff.gradient(
                lambda c, p: instance.problem.inner(p, c, batch), control, params, name="inner"
            ),
            self.params,
            instance.control,
            name="the inner objective",
        )
        self.linearised.append(found)
        return found


@dataclass(frozen=True, eq=False)
class Correction:
    """Where Newton's method led.

    Attributes:
        point: there.
        products: with J.
        convexity: the smallest eigenvalue or singular value of J met.
        flaw: why the point is of no use; empty if it is.
    """

    point: Point
    products: int
    convexity: float
    flaw: str = ""


def correct(here: Point, products: int) -> Correction:
    """Newton's method from a point, until the residual is small beside the first."""
    # An exact first step makes the estimate exact on quadratics. Further steps start from the
    # error of a linearisation, which they need not beat by far.
    step = solve(here.operator, here.residual.value, 1e-6, products // 2)
    found = Correction(here, step.products, smallest(step, here.residual.value))
    if flaw := flaw_of(step, "the system of the Newton correction"):
        # Rounding has a part in directions that are flat. A right-hand side of nothing else needs
        # no correction, and its run judges nothing; where no more than that is left, it is solved.
        if here.size <= here.rounding:
            return replace(found, convexity=math.inf)
        negative = step.ritz is not None and step.ritz < 0
        if negative or step.residual * here.size > here.rounding:
            return replace(found, flaw=flaw)
    found = replace(found, point=here.moved(step.solution))
    # A residual of rounding errors cannot be taken down, and need not: no derivative changes much
    # over so short a step.
    if tree.norm(step.solution) <= math.sqrt(here.eps) * tree.norm(here.params):
        return found
    while found.point.size > ENOUGH * here.size:
        limit = products - found.products - products // 3
        if limit < 1:
            break
        now = found.point
        step = solve(now.operator, now.residual.value, 0.1, limit)
        found = replace(found, products=found.products + step.products)
        if step.indefinite or not (there := now.moved(step.solution)).size < now.size:
            break
        met = smallest(step, now.residual.value)
        found = replace(found, point=there, convexity=min(found.convexity, met))
    if found.point.size <= SOUND * here.size:
        return found
    return replace(
        found,
        flaw=(
            f"Newton's method took the inner residual from {here.size:.1e} to "
            f"{found.point.size:.1e} only, so that no minimiser is near enough to judge by; {FAR}"
        ),
    )


def _random(like: Tree) -> Tree:
    """The same vector each time, in no direction of its own."""
    generator = torch.Generator().manual_seed(0)

    def draw(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        kind = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, generator=generator, dtype=kind, device="cpu").to(x)

    return tree.map_leaves(draw, like)


def solve(
    operator: Operator, rhs: Tree, rtol: float, limit: int, start: Tree = None
) -> LinearResult:
    """Solve a system with J or its adjoint by at most `limit` steps."""
    if operator.symmetric:
        plain = CG(rtol, max_steps=limit).solve(operator, rhs, start)
        left = limit - plain.products - BALANCING
        if plain.residual <= SOLVED or plain.indefinite or left < BALANCING:
            return plain
        # Unknowns of unlike scale: balanced they may be solved for in the products left. What the
        # plain run met of the spectrum stays true.
        balanced = CG(rtol, max_steps=left, probes=BALANCING)
        found = balanced.solve(operator, rhs, plain.solution)
        best = found if found.residual < plain.residual else plain
        return replace(best, products=plain.products + found.products, find_ritz=lambda: plain.ritz)
    return GMRES(restart=limit, rtol=rtol, max_steps=limit).solve(operator, rhs, start)


def smallest(solved: LinearResult, rhs: Tree) -> float:
    """The smallest eigenvalue or singular value that a linear solve met; never below the true."""
    met = ratio(tree.norm(rhs), tree.norm(solved.solution))
    return met if solved.ritz is None else min(met, solved.ritz)


def flaw_of(solved: LinearResult, name: str) -> str:
    """Why the solution is of no use; empty if it is."""
    if solved.indefinite and solved.ritz is not None and solved.ritz < 0:
        return (
            f"{name} met a direction of negative curvature, so that the params are near no minimum "
            f"of the inner objective; {FAR}"
        )
    if not solved.residual <= SOLVED:
        if solved.indefinite:
            return (
                f"{name} has no solution: its right-hand side has a part in a direction in which "
                "the inner objective is flat, so that (3) may have no gradient; add decay, or an "
                "outer objective that does not see that direction"
            )
        return (
            f"{name} has relative residual {solved.residual:.1e} after {solved.products} products; "
            "raise max_products, or improve the conditioning of the inner objective"
        )
    return ""


def eps_of(params: Tree) -> float:
    """Rounding of the coarsest dtype."""
    kinds = {x.dtype for x in tree.leaves_of(params) if tree.is_variable(x)}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def ratio(a: float, b: float) -> float:
    """`a / b`, infinite where b is not positive or the ratio is not finite."""
    found = a / b if b > 0 else math.inf
    return found if math.isfinite(found) else math.inf


def distance(a: Tree, b: Tree) -> float:
    """Norm of a - b."""
    return tree.norm(tree.subtract(a, b))
