"""One linear system as solvers see it: flat, scaled, its products counted and checked."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.errors import DivergenceError
from bilevel.linear.flat import Flat
from bilevel.linear.operator import LinearResult, Operator
from bilevel.tree import Tree


class System:
    """`(A + damping I) x = b` on flat vectors, with `b` scaled where it is large or small.

    The largest entry is then near 1. The scale is a power of two, so no digit changes; without it
    the square of a small residual would be lost to underflow, and zero would pass for the solution.
    Each column has its own, which a block diagonal operator does not notice. Lists have an entry a
    column, one where there are none.

    Attributes:
        flat: the layout of the trees.
        columns: of the operator.
        rhs: `b`, scaled; not to be written to.
        rhs_norms: of the scaled `b`.
        start_norms: of the scaled first iterate.
        eps: of the dtype of flat vectors.
        unit: half of it: no residual is known better than this times the terms it is made of.
        products: made so far.
    """

    def __init__(
        self,
        operator: Operator,
        rhs: Tree,
        start: Tree | None,
        damping: float = 0.0,
        probes: int = 0,
    ) -> None:
        """Lay out the system."""
        self.columns = operator.columns
        self._scale: float | Tensor | None
        self.flat = Flat(rhs, "rhs", self.columns)
        self.products = 0
        self._operator, self._damping = operator, damping
        self._balance: Tensor | None = None
        self._unchecked = {"operator.apply", "operator.adjoint"}
        b = self.flat.vector(rhs).detach()
        limits = torch.finfo(b.dtype)
        self.eps, self.unit = limits.eps, 0.5 * limits.eps
        if probes and self.flat.width > 1:
            # Solvers see D A D y = D b, x = D y: what is small to them is small in each unknown.
            self._balance = self._balanced(probes)
            b = b * self._balance
        small = limits.tiny ** (1 / 3)
        # Nothing is scaled where |b|^2 and its square are far from under- and overflow.
        if self.columns is None and small < (square := dot(b, b)) < 1 / small:
            self._scale, self.rhs, self.rhs_norms = None, b, [math.sqrt(square)]
        else:
            self._scale = self._power_of_two(b)
            self.rhs = b / self._scale
            self.rhs_norms = self.norms(self.rhs, 0)
        self._start: Tensor | None = None
        self.start_norms = [0.0] * len(self.rhs_norms)
        if start is not None:
            self.flat.check(start, "start", "start must match rhs")
            x = self.flat.vector(start).detach() / (1.0 if self._scale is None else self._scale)
            x = x if self._balance is None else x / self._balance
            if not torch.isfinite(x).all():
                raise DivergenceError("start is not finite: pass None to start at zero.")
            if self.columns is not None:
                # Where the right-hand side is zero, so is the solution.
                x[torch.tensor([not norm for norm in self.rhs_norms], device=x.device)] = 0
            self._start, self.start_norms = x, self.norms(x, 0)

    def _balanced(self, probes: int) -> Tensor:
        """D, with rows and columns of D A D of like size (Dauphin et al. 2015, 1502.04390)."""
        # The mean square of (A z)_i over random signs z is the square norm of row i: unlike an
        # estimate of the diagonal it is never negative, and few probes do.
        generator = torch.Generator().manual_seed(0)
        rows = self.flat.zeros()
        for _ in range(probes):
            signs = (
                torch.randint(0, 2, self.flat.shape, generator=generator, device="cpu") * 2.0 - 1
            )
            rows = rows.hypot(self.apply(signs.to(rows)))  # no square leaves the range of the dtype
        rows = rows / math.sqrt(probes)
        largest = rows.amax(-1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise DivergenceError("the operator returned a value that is not finite.")
        rows = torch.where(largest > 0, rows.clamp_min(self.eps * largest), 1.0)
        return rows.rsqrt()

    def _power_of_two(self, b: Tensor) -> float | Tensor:
        """The scale of each column."""
        if self.columns is None:
            return _below(b.abs().max().item() if self.flat.width else 0.0)
        largest = b.abs().amax(1).tolist() if self.flat.width else [0.0] * self.columns
        return self.factors([_below(x) for x in largest])

    def factors(self, values: list[float]) -> float | Tensor:
        """What flat vectors are multiplied by, one value a column."""
        if self.columns is None:
            return values[0]
        return torch.tensor(values, dtype=self.flat.dtype, device=self.flat.device)[:, None]

    def dots(self, a: Tensor, b: Tensor, step: int) -> list[float]:
        """Dot product of each column; `step` is for the error if one is not finite."""
        if self.columns is None:
            return [finite(dot(a, b), step)]
        return _finite_columns((a * b).sum(1), step)

    def norms(self, v: Tensor, step: int) -> list[float]:
        """Norm of each column; `step` is for the error if one is not finite."""
        return [math.sqrt(square) for square in self.dots(v, v, step)]

    def begin(self) -> tuple[Tensor, Tensor, list[float]]:
        """The first iterate, its residual and the norms of that; 0 or 1 product."""
        if self._start is None:
            return self.flat.zeros(), self.rhs.clone(), self.rhs_norms
        r = self.rhs - self.apply(self._start)
        return self._start, r, self.norms(r, 0)

    def apply(self, v: Tensor) -> Tensor:
        """`(A + damping I) v`; not to be written to."""
        return self._product(self._operator.apply, "operator.apply", v)

    def adjoint(self, v: Tensor) -> Tensor:
        """`(A^* + damping I) v`; not to be written to."""
        if self._operator.adjoint is None:
            return self.apply(v)
        return self._product(self._operator.adjoint, "operator.adjoint", v)

    def _product(self, apply: Callable[[Tree], Tree], name: str, v: Tensor) -> Tensor:
        self.products += 1
        D = self._balance
        u = v if D is None else v * D
        found = apply(self.flat.tree(u))
        if name in self._unchecked:
            self.flat.check(found, "product", f"{name} must return a vector like rhs")
            self._unchecked.discard(name)
        product = self.flat.vector(found)
        product = product.add(u, alpha=self._damping) if self._damping else product
        return product if D is None else product * D

    def floors(self, sizes: list[float], x: Tensor) -> list[float]:
        """Least norms of the residual of `x` that rounding allows, by size of the operator."""
        return [
            self.unit * (norm + size * length)
            for norm, size, length in zip(self.rhs_norms, sizes, self.norms(x, 0), strict=True)
        ]

    def result(
        self,
        x: Tensor,
        norms: list[float],
        steps: list[int],
        *,
        rtol: float,
        floors: list[float],
        indefinite: list[bool] | None = None,
        find_ritz: Callable[[], float | None] | None = None,
        measured: bool = False,
    ) -> LinearResult:
        """The record of an iterate."""
        if measured:
            # Tracked residuals drift from the true one, far in single precision, and a balanced one
            # is small in another norm: the larger of the two counts.
            norms = [*map(max, norms, self._true_residuals(x))]
        residuals, converged = [], []
        for norm, floor, size in zip(norms, floors, self.rhs_norms, strict=True):
            # A tolerance below rounding counts as reached at rounding.
            residual = max(norm / size, self.unit) if size else 0.0
            reached = max(rtol, min(floor / size, math.sqrt(self.eps))) if size else 0.0
            residuals.append(residual)
            converged.append(residual <= reached)
        single = self.columns is None
        return LinearResult(
            # Views of one storage would be a trap for who trains on them.
            self.flat.copied(self._scaled_back(x)),
            max(residuals),
            max(steps),
            self.products,
            all(converged),
            None if indefinite is None else any(indefinite),
            None if single else tuple(residuals),
            None if single else tuple(steps),
            None if single else tuple(converged),
            None if single or indefinite is None else tuple(indefinite),
            find_ritz,
        )

    def _scaled_back(self, x: Tensor) -> Tensor:
        x = x if self._balance is None else x * self._balance
        return x if self._scale is None else x * self._scale

    def _true_residuals(self, x: Tensor) -> list[float]:
        """Norms of b - A x, relative to b and scaled as the tracked ones are."""
        r, b = self.rhs - self.apply(x), self.rhs
        if self._balance is not None:
            r, b = r / self._balance, b / self._balance
        pairs = zip(self.norms(r, 0), self.norms(b, 0), self.rhs_norms, strict=True)
        return [left / size * norm if size else 0.0 for left, size, norm in pairs]


def solve_flat(
    method: Callable[[System], LinearResult],
    operator: Operator,
    rhs: Tree,
    start: Tree | None,
    damping: float = 0.0,
    probes: int = 0,
    *,
    scales: bool = True,
) -> LinearResult:
    """`method` of the flat system, without a graph; zero if `rhs` is zero."""
    # Where it fails on an operator whose squares leave the range of the dtype, it is asked again
    # with the operator scaled, if it `scales`: if what it finds depends on the solution alone.
    autodiff.refuse_inside("a linear solver", rhs, start, instead="bilevel.implicit")
    with autodiff.paused():
        try:
            found = _solved(method, operator, rhs, start, damping, probes)
        except DivergenceError:
            scale = _far_from_one(operator, rhs) if scales else None
            if scale is None:
                raise
            made = 1
        else:
            scale = _far_from_one(operator, rhs) if scales and found.residual >= 1 else None
            if scale is None:
                return found
            made = 1 + found.products
        scaled = _scaled(operator, 1 / scale)
        begun = None if start is None else _times(start, scale)
        again = _solved(method, scaled, rhs, begun, damping / scale, probes)
        return replace(
            again,
            solution=_times(again.solution, 1 / scale),
            products=again.products + made,
            find_ritz=lambda: None if again.ritz is None else again.ritz * scale,
        )


def _solved(
    method: Callable[[System], LinearResult],
    operator: Operator,
    rhs: Tree,
    start: Tree | None,
    damping: float,
    probes: int,
) -> LinearResult:
    system = System(operator, rhs, start, damping, probes)
    if any(system.rhs_norms):
        return method(system)
    norms = system.rhs_norms
    return system.result(system.flat.zeros(), norms, [0] * len(norms), rtol=0.0, floors=norms)


def _far_from_one(operator: Operator, rhs: Tree) -> float | None:
    """The size of an operator whose squares may leave the range of the dtype; None of any other."""
    generator = torch.Generator().manual_seed(0)

    def signs(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return (torch.randint(0, 2, x.shape, generator=generator, device="cpu") * 2.0 - 1).to(x)

    product = operator.apply(tree.map_leaves(signs, rhs))
    leaves = [x for x in tree.leaves_of(product) if tree.is_variable(x) and x.numel()]
    size = max((float(x.abs().max()) for x in leaves), default=0.0)
    limits = torch.finfo(Flat(rhs, "rhs", operator.columns).dtype)
    least = limits.tiny**0.25
    if not limits.tiny <= size <= limits.max or least < size < 1 / least:
        return None
    return _below(size)


def _scaled(operator: Operator, factor: float) -> Operator:
    """The operator times a number."""
    apply, adjoint = operator.apply, operator.adjoint
    return replace(
        operator,
        apply=lambda v: _times(apply(v), factor),
        adjoint=None if adjoint is None else lambda v: _times(adjoint(v), factor),
    )


def _times(vector: Tree, factor: float) -> Tree:
    return tree.map_leaves(lambda x: None if x is None else x * factor, vector)


def _below(largest: float) -> float:
    """The largest power of two that is not above a positive number."""
    if not math.isfinite(largest):
        raise DivergenceError("rhs is not finite: look at what computed it.")
    return 2.0 ** (math.frexp(largest)[1] - 1)


def dot(a: Tensor, b: Tensor) -> float:
    """Dot product of flat vectors."""
    return torch.dot(a, b).item()


def finite(value: float, step: int, place: str = "") -> float:
    """`value`, if it is finite."""
    if not math.isfinite(value):
        raise DivergenceError(
            f"the linear solve met {value} at step {step}{place}: the operator returned a value "
            "that is not finite, or the iteration grew without bound. Check the operator at the "
            "present point."
        )
    return value


def _finite_columns(values: Tensor, step: int) -> list[float]:
    """`finite`, of one value a column."""
    return [finite(x, step, f" in column {k}") for k, x in enumerate(values.tolist())]
