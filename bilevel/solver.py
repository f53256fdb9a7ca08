"""Hypergradients, and descent along them: Algorithms 1 and 3."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import tree
from bilevel.certificates.against_minimiser import AgainstMinimiser
from bilevel.certificates.certificate import Certificate, Certifier
from bilevel.checks import check_choice, check_kind, check_range, check_whole
from bilevel.dynamics.per_step import PerStep
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.inner.problem import BilevelProblem
from bilevel.methods.base import HypergradientMethod, Instance, Warm
from bilevel.methods.mlm import MLM
from bilevel.optim.rules import InnerOptimizer
from bilevel.outer.descent import Loop, MakeOptimizer, adam, descend
from bilevel.outer.watching import ON_FAILURE, OnFailure, Progress, above_tolerance, report
from bilevel.solution import Hypergradient, Solution
from bilevel.tree import Tree


@dataclass(frozen=True)
class BilevelSolver:
    """Solver of bilevel problems; swapping the method is one argument.

    Attributes:
        problem: the two objectives.
        optimizer: makes the inner steps.
        inner_steps: their number.
        method: how hypergradients are found: `MLM`, `Unrolled`, `Implicit`, `OneStep`.
        certificate: how they are judged, and against what: `AgainstMinimiser`, the hypergradient
            of (3) at the exact inner minimiser, or `AgainstSteps`, that of the k-step solution
            itself; None switches that off.
        on_failure: what to do where a hypergradient is not trustworthy, or a tolerance that was
            asked for is not reached.

    Raises:
        ArgumentError: if a field is not what it should be.

    Example:
        >>> import dataclasses, torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = BilevelSolver(problem, bl.optim.SGD(0.2), inner_steps=80)
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(0.0))
        >>> found.gradient  # 2 (a / 3 - 1) / 3
        tensor(-0.6667)
        >>> dataclasses.replace(solver, method=bl.Implicit()).hypergradient(
        ...     torch.tensor(0.0), torch.tensor(0.0)
        ... ).gradient
        tensor(-0.6667)
    """

    problem: BilevelProblem
    optimizer: InnerOptimizer
    inner_steps: int = 100
    method: HypergradientMethod = field(default_factory=MLM)
    certificate: Certifier | None = field(default_factory=AgainstMinimiser)
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        check_kind(self.problem, BilevelProblem, "problem", "a BilevelProblem")
        rule = "an inner optimiser such as bilevel.optim.SGD(0.1)"
        check_kind(self.optimizer, InnerOptimizer, "optimizer", rule)
        check_whole(self.inner_steps, "inner_steps")
        method = "a method such as MLM() or Implicit()"
        check_kind(self.method, HypergradientMethod, "method", method)
        certificate = "AgainstMinimiser(...), AgainstSteps(...) or None"
        check_kind(self.certificate, Certifier | None, "certificate", certificate)
        check_choice(self.on_failure, ON_FAILURE, "on_failure")

    def hypergradient(
        self,
        params: Tree,
        control: Tree,
        inner_batch: Any = None,
        outer_batch: Any = None,
        linear_batch: Any = None,
        warm: Warm | None = None,
    ) -> Hypergradient:
        """Value and gradient of the outer objective at the inner solution.

        Args:
            params: where the inner iteration starts.
            control: the outer variable, alpha.
            inner_batch: third argument of the inner objective; constant, or a `ByStep`.
            outer_batch: third argument of the outer objective.
            linear_batch: third argument of the inner objective where its solution is judged, and
                where `Implicit` linearises it: all data or a large batch. None is `inner_batch`;
                needed for trust if that is a `ByStep`.
            warm: of an earlier hypergradient, to go on from there instead of `params`. A problem
                with `start` always begins there, and takes the linear solution alone.

        Returns:
            The hypergradient, the inner solution and the certificate.

        Raises:
            StructureError: if an objective returns anything but a real scalar, or trees differ in
                structure, shape, dtype or device.
            LostGradientError: if nothing reads a part of the control, the inner objective does not
                read the params, or a function closes over a tensor that requires grad.
            DivergenceError: if something is not finite; it names the inner step where that began.
            ConvergenceError: if it is not trustworthy and `on_failure` is "raise".
        """
        found = self._find(
            self._instance(params, control, inner_batch, outer_batch, warm, linear_batch)
        )
        if found.complaint is not None:
            report(found.complaint, self.on_failure)
        return found

    def value(
        self,
        params: Tree,
        control: Tree,
        inner_batch: Any = None,
        outer_batch: Any = None,
        warm: Warm | None = None,
    ) -> Tensor:
        """The outer objective at the inner solution, without its gradient.

        Args:
            params: as in `hypergradient`, like the other arguments.
            control: the outer variable.
            inner_batch: of the inner objective.
            outer_batch: of the outer objective.
            warm: to go on from.

        Returns:
            Real scalar, detached; `hypergradient(...).value`.
        """
        instance = self._instance(params, control, inner_batch, outer_batch, warm)
        return instance.outer(self.optimizer.params(instance.iterated.state), instance.control)

    def advance(
        self, params: Tree, control: Tree, inner_batch: Any = None, warm: Warm | None = None
    ) -> Warm:
        """The inner steps alone, at a fixed control.

        Args:
            params: as in `hypergradient`, like the other arguments.
            control: the outer variable.
            inner_batch: of the inner objective.
            warm: to go on from.

        Returns:
            Where they led; `optimizer.params(warm.state)` are the params.
        """
        return self._instance(params, control, inner_batch, None, warm).iterated

    def solve(
        self,
        params: Tree,
        control: Tree,
        optimizer: MakeOptimizer = adam,
        steps: int = 200,
        batches: Iterable[tuple[Any, Any]] | None = None,
        warm_start: bool = True,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        project: Callable[[Tree], Tree] | None = None,
        linear_batch: Any = None,
        inner_tolerance: float | None = None,
        tolerance: float = 0.0,
        callback: Callable[[Progress], bool | None] | None = None,
        progress: bool = False,
    ) -> Solution:
        """Minimise the outer objective over the control, from `control`.

        Args:
            params: where the first inner iteration starts.
            control: to begin with; it is copied, not changed.
            optimizer: makes a `torch.optim` optimiser from a list of tensors; called once.
                `step(closure)` is used always, so that LBFGS works.
            steps: updates at most.
            batches: pairs (inner_batch, outer_batch), one an update, begun again when they end;
                None gives both objectives None.
            warm_start: go on from the inner state, the step count and the linear solution of the
                update before; False starts every inner iteration at `params`.
            scheduler: makes a learning-rate scheduler, stepped once an update.
            project: maps the control into its feasible set after each update.
            linear_batch: as in `hypergradient`, for all updates.
            inner_tolerance: end an inner iteration where the norm of its residual is at most this.
                A method that keeps the trajectory first iterates once more to find the number of
                steps.
            tolerance: stop when the norm of the hypergradient is at most this.
            callback: called after each update; True stops the iteration.
            progress: show a bar, by rich or tqdm.

        Returns:
            The last control, the inner solution and the history.

        Raises:
            ArgumentError: if a setting is out of range or the batches are empty.
            ConvergenceError: if `on_failure` is "raise", and a hypergradient is not trustworthy or
                the tolerance was not reached.
            DivergenceError: if something is not finite; it names the outer iteration, and the
                inner step where that began.
        """
        if inner_tolerance is not None:
            check_range(inner_tolerance, "inner_tolerance", above=0)
        loop = Loop(steps, batches, scheduler, project, tolerance, callback, progress)
        history = _History(self.on_failure)

        def evaluate(alpha: Tree, batch: Any, step: int) -> tuple[float, Hypergradient]:
            warm = history.warm if warm_start else None
            try:
                found = self._find(
                    self._instance(
                        params, alpha, *_pair(batch), warm, linear_batch, inner_tolerance
                    )
                )
            except DivergenceError as error:
                raise DivergenceError(f"iteration {step}: {error}") from error
            history.judge(found, step)
            return float(found.value), found

        done = descend(evaluate, control, optimizer, loop, history.accept)
        steps = len(done.costs)
        value, norm, found = done.last or (math.nan, math.nan, None)
        converged = done.converged
        if batches is None and not converged:
            value, found = evaluate(done.control, None, steps)
            norm = tree.norm(found.gradient)
            converged = tolerance > 0 and norm <= tolerance
        if history.complaints:
            report(history.summary(steps), self.on_failure)
        if tolerance > 0 and not converged:
            report(above_tolerance(norm, tolerance, steps), self.on_failure)
        return Solution(
            done.control,
            found.params if found is not None else params,
            value,
            norm,
            found,
            done.costs,
            done.gradient_norms,
            history.certificates,
            steps,
            converged,
        )

    def _find(self, instance: Instance) -> Hypergradient:
        found = self.method.find(instance)
        norm = tree.norm(found.gradient)
        if not (math.isfinite(float(found.value)) and math.isfinite(norm)):
            raise DivergenceError(
                f"the outer objective is {float(found.value):g} and the norm of the hypergradient "
                f"{norm:g}, although the inner solution is finite: look for a square root or a "
                "division at zero in the objectives, or take a smaller step size."
            )
        certificate = self.certificate and self.certificate.certify(instance, found)
        return Hypergradient(
            found.value,
            found.gradient,
            self.optimizer.params(found.warm.state),
            certificate,
            found.warm,
            found.linear,
            found.truncation,
            found.flaw,
        )

    def _instance(
        self,
        params: Tree,
        control: Tree,
        inner_batch: Any,
        outer_batch: Any,
        warm: Warm | None,
        linear_batch: Any = None,
        inner_tolerance: float | None = None,
    ) -> Instance:
        for name, value in (("params", params), ("control", control)):
            tree.check_leaves(value, name)
            if not any(tree.is_variable(x) for x in tree.leaves_of(value)):
                raise ArgumentError(
                    f"{name} must hold a floating-point or complex tensor, got {value!r}."
                )
        if isinstance(control, PerStep):
            raise ArgumentError(
                "the control of a bilevel problem is shared by all inner steps, got a PerStep: "
                "stack what changes with the step, and read it by "
                "ByStep(lambda t: lambda control: control['rates'][t - 1])."
            )
        return Instance(
            self.problem,
            self.optimizer,
            self.inner_steps,
            tree.detach(params),
            tree.detach(control),
            inner_batch,
            outer_batch,
            linear_batch,
            warm,
            inner_tolerance,
        )


def _pair(batch: Any) -> tuple[Any, Any]:
    if batch is None:
        return None, None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ArgumentError(
            "batches must give pairs (inner_batch, outer_batch), got "
            f"{type(batch).__name__}; use zip(inner_batches, outer_batches)."
        )
    return batch[0], batch[1]


class _History:
    """What `solve` carries from one update to the next."""

    def __init__(self, on_failure: OnFailure) -> None:
        self.warm: Warm | None = None
        self.certificates: list[Certificate] = []
        self.complaints: list[tuple[int, str]] = []
        self._on_failure: OnFailure = on_failure

    def judge(self, found: Hypergradient, step: int) -> None:
        """Note a hypergradient that is not trustworthy; raise at once if asked to."""
        if found.complaint is None:
            return
        if self._on_failure == "raise":
            report(f"iteration {step}: {found.complaint}", self._on_failure)
        self.complaints.append((step, found.complaint))

    def accept(self, found: Hypergradient) -> None:
        """Start the next update from here: all evaluations of one update start at the same."""
        self.warm = found.warm
        if found.certificate is not None:
            self.certificates.append(found.certificate)

    def summary(self, steps: int) -> str:
        """One sentence for all complaints."""
        first, complaint = self.complaints[0]
        return (
            f"{len(self.complaints)} hypergradients of {steps} updates are not trustworthy; the "
            f"first, of iteration {first}: {complaint}"
        )
