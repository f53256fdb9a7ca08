"""Checks for a user's own problem: hypergradients, gradients and adjoints."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checks import check_range, check_whole
from bilevel.control.adjoint import adjoint
from bilevel.control.rollout import total_cost
from bilevel.control.tangent import hvp
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import BilevelError
from bilevel.linear.gmres import GMRES
from bilevel.methods.base import HypergradientMethod
from bilevel.methods.implicit import Implicit
from bilevel.methods.mlm import MLM
from bilevel.methods.one_step import OneStep
from bilevel.methods.unrolled import Unrolled
from bilevel.solver import BilevelSolver
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import RandomState, devices_of, preserved
from bilevel.tree import Tree


@dataclass(frozen=True)
class DotProductTest:
    """Re<A v, w> and Re<v, A^* w> of random v and w.

    Attributes:
        forward: the first.
        adjoint: the second.
        difference: of the two, relative to |A v| |w|.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> found = dot_product_test(
        ...     lambda v: matrix @ v, lambda w: matrix.T @ w, torch.zeros(2), torch.zeros(3)
        ... )
        >>> found.difference < 1e-6
        True
    """

    forward: float
    adjoint: float
    difference: float


def dot_product_test(
    apply: Callable[[Tree], Tree],
    adjoint: Callable[[Tree], Tree],
    domain: Tree,
    image: Tree | None = None,
    *,
    seed: int = 0,
) -> DotProductTest:
    """Whether `adjoint` is the adjoint of `apply` under Re<., .>.

    Args:
        apply: a real-linear map of trees.
        adjoint: what should be its adjoint.
        domain: tree like the arguments of `apply`; values do not count.
        image: tree like its results; None where that is the domain.
        seed: of the random vectors.

    Returns:
        Both inner products and their difference; for an adjoint it is a few times the rounding.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> found = dot_product_test(
        ...     lambda v: A @ v, lambda w: A.T @ w, torch.ones(2), torch.ones(3)
        ... )
        >>> found.difference < 1e-6
        True
    """
    generator = torch.Generator().manual_seed(seed)
    v = random_like(domain, generator)
    w = random_like(domain if image is None else image, generator)
    Av = apply(v)
    forward, backward = float(tree.inner(Av, w)), float(tree.inner(v, adjoint(w)))
    size = tree.norm(Av) * tree.norm(w)
    return DotProductTest(forward, backward, abs(forward - backward) / size if size else 0.0)


@dataclass(frozen=True)
class TaylorTest:
    """Remainders of a first-order expansion.

    Attributes:
        steps: h.
        remainders: |f(x + h d) - f(x) - h Re<g, d>|.
        order: at which they fall with h, from those above rounding: 2 for a right gradient, 1 for
            a wrong one; infinite if all are rounding.

    Example:
        >>> point = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> found = taylor_test(lambda x: (x**3).sum(), 3 * point**2, point)
        >>> round(found.order)
        2
    """

    steps: tuple[float, ...]
    remainders: tuple[float, ...]
    order: float


def taylor_test(
    function: Callable[[Tree], Tensor],
    gradient: Tree,
    point: Tree,
    *,
    seed: int = 0,
    largest: float = 1e-1,
    n_steps: int = 6,
) -> TaylorTest:
    """Whether `gradient` is that of `function` at `point`, along a random direction.

    Args:
        function: of a tree, a real scalar.
        gradient: a vector of the space of `point`; None counts as zero.
        point: floating-point or complex tensors; other leaves stay as they are.
        seed: of the direction, which has norm 1.
        largest: first step; each is half of the one before.
        n_steps: how many, at least 2.

    Returns:
        The remainders and their order.

    Raises:
        ArgumentError: if there are fewer than two steps.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> right = taylor_test(lambda x: (x**3).sum(), 3 * x**2, x)
        >>> wrong = taylor_test(lambda x: (x**3).sum(), 3 * x, x)
        >>> round(right.order), round(wrong.order)
        (2, 1)
    """
    check_whole(n_steps, "n_steps", 2)
    direction = unit_like(point, torch.Generator().manual_seed(seed))
    value, slope = float(function(point)), float(tree.inner(gradient, direction))
    steps = [largest / 2**i for i in range(n_steps)]
    values = [float(function(tree.moved(point, direction, -h))) for h in steps]
    remainders = [abs(v - value - h * slope) for v, h in zip(values, steps, strict=True)]
    floor = 100 * _eps(point) * max(map(abs, (value, *values)))
    seen = [(math.log(h), math.log(r)) for h, r in zip(steps, remainders, strict=True) if r > floor]
    return TaylorTest(tuple(steps), tuple(remainders), _slope(seen))


def _slope(points: list[tuple[float, float]]) -> float:
    if len(points) < 2:
        return math.inf
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def _difference_step(control: Tree) -> float:
    """Where rounding and curvature weigh alike in a central difference."""
    return _eps(control) ** (1 / 3) * max(1.0, tree.norm(control))


def _eps(values: Tree) -> float:
    return max(torch.finfo(x.dtype).eps for x in tree.leaves_of(values) if tree.is_variable(x))


def random_like(values: Tree, generator: torch.Generator) -> Tree:
    """A vector of the space of `values` with normal entries, drawn on the CPU."""
    return tree.map_leaves(
        lambda x: (
            torch.randn(x.shape, dtype=x.dtype, generator=generator, device="cpu").to(x.device)
            if tree.is_variable(x)
            else None
        ),
        values,
    )


def unit_like(values: Tree, generator: torch.Generator) -> Tree:
    """A random vector of norm 1."""
    vector = random_like(values, generator)
    size = tree.norm(vector)
    return tree.map_leaves(lambda x: None if x is None else x / size, vector)


@dataclass(frozen=True)
class GradientCheck:
    """A derivative of a control problem and the difference that it should be, along a direction.

    Attributes:
        slope: Re<gradient, direction>, by `adjoint`; or Re<e, H d>, by `hvp`.
        difference: the central difference of J, or of Re<e, gradient>.
        noise: what doubling the step changes, and rounding.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c), lambda u, c: u, horizon=3
        ... )
        >>> found = check_gradient(problem, torch.tensor(1.0), torch.tensor(2.0))
        >>> abs(found.slope), found.agrees  # 3 c^2
        (12.0, True)
    """

    slope: float
    difference: float
    noise: float

    @property
    def agrees(self) -> bool:
        """Whether both are the same, to a thousandth and to what the difference is good for."""
        size = max(abs(self.slope), abs(self.difference))
        return abs(self.slope - self.difference) <= 1e-3 * size + 4 * self.noise


def check_gradient(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
    seed: int = 0,
) -> GradientCheck:
    """Whether the gradient that `adjoint` finds is that of the cost, along a random direction.

    It sees what no sweep can: a `detach()`, an `.item()` or an `autograd.grad` without
    `create_graph` inside a step or a cost, a wrong backward of one's own, a straight-through
    estimate, draws from a generator of one's own, a cost that is not smooth. Steps that draw from
    torch's default generators draw the same in every evaluation. It costs a sweep and four costs.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        checkpointing: as in `adjoint`.
        seed: of the direction.

    Returns:
        Both numbers; `agrees` compares them.

    Example:
        >>> import bilevel as bl
        >>> terminal = lambda state, control: state**2
        >>> whole = bl.ControlProblem(bl.Map(lambda u, c, t: u * c), terminal, horizon=3)
        >>> cut = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c.detach() + c), terminal, horizon=3
        ... )
        >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
        >>> check_gradient(whole, one, two).agrees, check_gradient(cut, one, two).agrees
        (True, False)
    """
    direction = unit_like(control, torch.Generator().manual_seed(seed))

    def cost(moved: Tree) -> float:
        with autodiff.paused():
            return float(total_cost(problem, observation, moved, checkpointing=checkpointing))

    def slope(there: Tree) -> tuple[float, float]:
        found = adjoint(problem, observation, there, checkpointing=checkpointing)
        return float(tree.inner(found.gradient, direction)), float(found.cost)

    return _compared(observation, control, direction, slope, cost)


def check_product(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
    seed: int = 0,
) -> GradientCheck:
    """Whether `hvp` is the derivative of the gradient, between two random directions.

    It sees second derivatives that are lost: a backward of one's own that detaches what it saved,
    or an `autograd.grad` without `create_graph` inside a step, although the gradient is right. It
    costs five sweeps.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        checkpointing: as in `hvp`.
        seed: of the directions d and e.

    Returns:
        Re<e, H d> and the difference of Re<e, gradient> along d; `agrees` compares them.

    Example:
        >>> import bilevel as bl
        >>> step = bl.Map(lambda u, c, t: u * c)
        >>> problem = bl.ControlProblem(step, lambda state, control: state**2, horizon=3)
        >>> check_product(problem, torch.tensor(1.0), torch.tensor(2.0)).agrees
        True
    """
    generator = torch.Generator().manual_seed(seed)
    direction, other = unit_like(control, generator), unit_like(control, generator)

    def slope(there: Tree) -> tuple[float, float]:
        found = hvp(problem, observation, there, direction, checkpointing=checkpointing)
        return float(tree.inner(found.product, other)), tree.norm(found.gradient)

    def along(moved: Tree) -> float:
        found = adjoint(problem, observation, moved, checkpointing=checkpointing)
        return float(tree.inner(found.gradient, other))

    return _compared(observation, control, direction, slope, along)


def _compared(
    observation: Tree,
    control: Tree,
    direction: Tree,
    slope: Callable[[Tree], tuple[float, float]],
    value: Callable[[Tree], float],
) -> GradientCheck:
    """A slope, given with the size of what it is one of, and the differences of that."""
    control = tree.detach(control)
    devices = devices_of((observation, control))
    start = RandomState.capture(devices)

    def at(h: float) -> float:
        start.restore()
        return value(tree.moved(control, direction, -h))

    with preserved(devices):
        found, size = slope(control)
        h = _difference_step(control)
        fine, coarse = ((at(k) - at(-k)) / (2 * k) for k in (h, 2 * h))
    rounding = 4 * _eps(control) * abs(size) / h
    return GradientCheck(found, fine, abs(fine - coarse) + rounding)


@dataclass(frozen=True, eq=False)
class MethodCheck:
    """One method on the problem at hand.

    Attributes:
        method: which.
        gradient: its hypergradient; None if it does not apply.
        error: of its slopes along the directions, relative to the finite differences.
        seconds: of one hypergradient, the second of two, without certificate.
        estimate: relative error against the exact inner minimiser, as the certificate estimates
            it; NaN without certificate.
        note: why it does not apply, or what the linear solver said.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> found = check_hypergradient(solver, torch.tensor(0.0), torch.tensor(3.0))
        >>> row = next(one for one in found.rows if one.method == bl.MLM())
        >>> type(row.method).__name__, row.gradient, row.error < 1e-3
        ('MLM', tensor(4.), True)
    """

    method: HypergradientMethod
    gradient: Tree
    error: float
    seconds: float
    estimate: float
    note: str


@dataclass(frozen=True, eq=False)
class HypergradientCheck:
    """All methods against finite differences of the k-step value; prints as a table.

    Attributes:
        rows: one a method.
        difference_error: of the finite differences, relative: what doubling their step changes.
        recommendation: which method to take, and why.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> found = check_hypergradient(solver, torch.tensor(0.0), torch.tensor(3.0))
        >>> found.recommendation.split()[0], str(found).splitlines()[0].split()[0]
        ('Take', 'method')
    """

    rows: tuple[MethodCheck, ...]
    difference_error: float
    recommendation: str

    def __str__(self) -> str:
        """The table."""
        lines = [
            f"{'method':10} {'error to differences':>21} {'seconds':>9} {'to exact minimiser':>19}"
        ]
        for row in self.rows:
            numbers = f"{row.error:21.1e} {row.seconds:9.3g} {row.estimate:19.1e}"
            if row.gradient is None:
                numbers = f"{'-':>21} {'-':>9} {'-':>19}"
            lines.append(f"{type(row.method).__name__:10} {numbers}  {row.note}".rstrip())
        lines.append(
            f"Differences are central, of the k-step value, and good to {self.difference_error:.1e}"
            "; the last column is the estimate of the certificate."
        )
        return "\n".join([*lines, self.recommendation])


CUT = (
    "they agree with each other, so a gradient is cut on the way. Look in the objectives and the "
    "steps for detach(), .data, .item(), float(), NumPy, no_grad(), torch.tensor([...]) of tensors "
    "or torch.autograd.grad without create_graph=True. What differs on purpose, as a "
    "straight-through estimate does, cannot be checked by differences."
)


def check_hypergradient(
    solver: BilevelSolver,
    params: Tree,
    control: Tree,
    inner_batch: Any = None,
    outer_batch: Any = None,
    *,
    methods: Sequence[HypergradientMethod] | None = None,
    n_directions: int = 3,
    step: float | None = None,
    seed: int = 0,
) -> HypergradientCheck:
    """Compare all methods with central finite differences on one's own problem.

    The differences are of the value after the solver's inner steps, so that `Unrolled` and `MLM`
    must agree with them; `Implicit` does as far as the inner iteration has converged. Objectives
    that draw, a dropout mask or a minibatch, draw the same in every evaluation.

    Args:
        solver: whose problem, optimiser and number of inner steps are used.
        params: where the inner iteration starts.
        control: the outer variable.
        inner_batch: as in `BilevelSolver.hypergradient`.
        outer_batch: as in `BilevelSolver.hypergradient`.
        methods: to compare; None takes all four and the solver's own.
        n_directions: random directions, each four solves.
        step: of the differences; None is the cube root of the rounding, times the size of the
            control.
        seed: of the directions.

    Returns:
        A table with errors and times, and a recommendation.

    Raises:
        ArgumentError: if `n_directions` or `step` is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 60)
        >>> point = torch.tensor(0.0, dtype=torch.float64)
        >>> bl.check_hypergradient(solver, point, point).recommendation[:13]
        'Take Implicit'
    """
    check_whole(n_directions, "n_directions", 1)
    if step is not None:
        check_range(step, "step", above=0)
    quiet = replace(solver, certificate=None, on_failure="ignore")
    control = tree.detach(control)
    generator = torch.Generator().manual_seed(seed)
    directions = [unit_like(control, generator) for _ in range(n_directions)]
    h = step or _difference_step(control)

    batches = inner_batch, outer_batch
    devices = devices_of((params, control))
    start = RandomState.capture(devices)

    def value(direction: Tree, h: float) -> float:
        start.restore()
        return float(quiet.value(params, tree.moved(control, direction, -h), *batches))

    def slopes(h: float) -> Tensor:
        found = [(value(d, h) - value(d, -h)) / (2 * h) for d in directions]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    with preserved(devices):
        fine, coarse = slopes(h), slopes(2 * h)
        rows = [
            _row(replace(quiet, method=method), solver, params, control, batches, start)
            for method in (_all_methods(solver) if methods is None else methods)
        ]
    size = float(fine.norm()) or 1.0
    judged = []
    for row in rows:
        if row.gradient is not None:
            along = [float(tree.inner(row.gradient, d)) for d in directions]
            error = (
                float((torch.tensor(along, dtype=torch.float64, device="cpu") - fine).norm()) / size
            )
            row = replace(row, error=error)
        judged.append(row)
    own = float((fine - coarse).norm()) / size
    return HypergradientCheck(tuple(judged), own, _recommend(judged, own))


def _all_methods(solver: BilevelSolver) -> list[HypergradientMethod]:
    by_objective = solver.problem.residual is None
    implicit = Implicit() if solver.optimizer.symmetric and by_objective else Implicit(GMRES())
    reversible = solver.optimizer.reversible
    standard = {
        type(m): m for m in (Unrolled(), MLM(), implicit, OneStep()) if reversible or not m.steps
    }
    return list({**standard, type(solver.method): solver.method}.values())


def _row(
    quiet: BilevelSolver,
    solver: BilevelSolver,
    params: Tree,
    control: Tree,
    batches: tuple[Any, Any],
    start: RandomState,
) -> MethodCheck:
    try:
        quiet.hypergradient(params, control, *batches)
        start.restore()
        begun = time.perf_counter()
        found = quiet.hypergradient(params, control, *batches)
        seconds = time.perf_counter() - begun
    except BilevelError as error:
        return MethodCheck(quiet.method, None, math.nan, math.nan, math.nan, str(error))
    estimate = math.nan
    if solver.certificate is not None:
        judged = replace(quiet, certificate=solver.certificate)
        start.restore()
        certificate = judged.hypergradient(params, control, *batches).certificate
        estimate = math.nan if certificate is None else certificate.error_estimate
    return MethodCheck(
        quiet.method, found.gradient, math.nan, seconds, estimate, found.complaint or ""
    )


def _recommend(rows: Sequence[MethodCheck], difference_error: float) -> str:
    by = {type(row.method): row for row in rows if row.gradient is not None}
    if not difference_error <= 0.1:
        return (
            "The differences do not settle, so no method can be judged by them: the objectives are "
            "not smooth here, not deterministic, or computed in too low a precision, or the "
            "hypergradient is zero. Try float64, another step=, or another point."
        )
    allowed = max(10 * difference_error, 1e-6)
    for kind in (Unrolled, MLM):
        if kind in by and not by[kind].error <= allowed:
            differs = f"{kind.__name__} differs from the differences by {by[kind].error:.1e}: "
            if difference_error <= 1e-2 < by[kind].error:
                return differs + CUT
            return differs + (
                "the objectives are not smooth here, not deterministic, or computed in too low a "
                "precision. Try float64, another step=, or another point, before any method."
            )
    implicit = by.get(Implicit)
    if implicit is not None and not implicit.note and implicit.error <= max(1e-2, allowed):
        return (
            f"Take Implicit: it agrees to {implicit.error:.1e}, so the inner iteration has "
            "converged, and it keeps no trajectory."
        )
    why = "does not apply" if implicit is None else f"is {implicit.error:.0%} off"
    return (
        f"Take MLM, exact for these inner steps in the memory you choose: Implicit {why}. If you "
        "want the hypergradient at the exact inner minimiser, make more inner steps and look again."
    )
