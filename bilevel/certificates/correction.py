"""The params of a bilevel problem moved to the inner minimiser by Newton's method."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bilevel import autodiff, tree
from bilevel.autodiff import Linearisation
from bilevel.linear.cg import CG
from bilevel.linear.gmres import GMRES
from bilevel.linear.operator import LinearResult, Operator
from bilevel.methods.base import Instance, OuterGradient
from bilevel.methods.implicit import transposed
from bilevel.settings import at_step
from bilevel.tree import Tree

SOLVED = 1e-3  # relative residual up to which a linear system counts as solved
SOUND = 0.1  # largest factor to which a sound correction takes the residual
ENOUGH = 1e-2  # factor from which a further step would pay no more


@dataclass(frozen=True, eq=False)
class Point:
    """Derivatives at some params: J and C of the residual R, b and d of the outer objective.

    Attributes:
        instance: the problem.
        params: where.
        residual: R, linearised there.
        known: b and d there, if they were taken before.
    """

    instance: Instance
    params: Tree
    residual: Linearisation
    known: OuterGradient | None = None

    def moved(self, step: Tree) -> "Point":
        """The point at `params - step`."""
        params = tree.moved(self.params, step, 1.0)
        return Point(self.instance, params, self.instance.linearised(params))

    @cached_property
    def size(self) -> float:
        """Norm of R."""
        return tree.norm(self.residual.value)

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

    @property
    def transposed(self) -> Operator:
        """The adjoint of J."""
        return transposed(self.residual, self.instance)

    def mixed(self, vector: Tree) -> Tree:
        """The adjoint of C, applied to a vector."""
        return tree.filled(self.residual.pull(vector, 1), self.instance.control)

    def coupling(self, start: Tree) -> float:
        """Norm of C from below, by a power iteration of two products."""
        # C is also the adjoint of the derivative of grad_alpha f in the params, up to a factor
        # where R is one times grad f: so no third derivative is taken where R is a gradient.
        symmetric = self.instance.optimizer.residual_is_gradient
        in_control = self._in_control() if symmetric else self.residual
        scale = 1 / (tree.norm(start) or 1.0)
        unit = tree.map_leaves(lambda x: None if x is None else x * scale, start)
        along = in_control.pull(unit, 0) if symmetric else in_control.push(unit, 1)
        along = tree.filled(along, self.params)
        size = tree.norm(along)
        return ratio(tree.norm(self.mixed(along)), size) if size else 0.0

    def _in_control(self) -> Linearisation:
        """The gradient of the inner objective in the control, in both arguments."""
        instance = self.instance
        batch = at_step(instance.inner_batch, instance.last_step)
        return Linearisation(
            lambda params, control: autodiff.gradient(
                lambda c, p: instance.problem.inner(p, c, batch), control, params, name="inner"
            ),
            self.params,
            instance.control,
            name="the inner objective",
        )


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
        return replace(found, flaw=flaw)
    found = replace(found, point=here.moved(step.solution))
    # A residual of rounding errors cannot be taken down, and need not: no derivative changes much
    # over so short a step.
    kinds = {x.dtype for x in tree.leaves_of(here.params) if tree.is_variable(x)}
    eps = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    if tree.norm(step.solution) <= math.sqrt(eps) * tree.norm(here.params):
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
            f"{found.point.size:.1e} only, so that no minimiser is near enough to judge by; make "
            "more inner steps"
        ),
    )


def solve(
    operator: Operator, rhs: Tree, rtol: float, limit: int, start: Tree = None
) -> LinearResult:
    """Solve a system with J or its adjoint by at most `limit` steps."""
    if operator.symmetric:
        return CG(rtol, max_steps=limit).solve(operator, rhs, start)
    return GMRES(restart=limit, rtol=rtol, max_steps=limit).solve(operator, rhs, start)


def smallest(solved: LinearResult, rhs: Tree) -> float:
    """The smallest eigenvalue or singular value that a linear solve met; never below the true."""
    met = ratio(tree.norm(rhs), tree.norm(solved.solution))
    return met if solved.ritz is None else min(met, solved.ritz)


def flaw_of(solved: LinearResult, name: str) -> str:
    """Why the solution is of no use; empty if it is."""
    if solved.indefinite:
        return (
            f"{name} met a direction of non-positive curvature, so that the params are near no "
            "strict minimum of the inner objective, and (3) may have no gradient; add decay, or "
            "make more inner steps"
        )
    if not solved.residual <= SOLVED:
        return (
            f"{name} has relative residual {solved.residual:.1e} after {solved.products} products; "
            "raise max_products, or improve the conditioning of the inner objective"
        )
    return ""


def ratio(a: float, b: float) -> float:
    """`a / b`, infinite where b is not positive or the ratio is not finite."""
    found = a / b if b > 0 else math.inf
    return found if math.isfinite(found) else math.inf


def distance(a: Tree, b: Tree) -> float:
    """Norm of a - b."""
    return tree.norm(tree.subtract(a, b))
