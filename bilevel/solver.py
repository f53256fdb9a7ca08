"""Hypergradients, and descent along them: Algorithms 1 and 3."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import tree
from bilevel.certificates.against_minimiser import AgainstMinimiser
from bilevel.certificates.against_steps import AgainstSteps
from bilevel.certificates.certificate import Certifier
from bilevel.checks import check_arguments, check_choice, check_kind, check_whole
from bilevel.control.tangent import HessianProduct
from bilevel.dynamics.per_step import BILEVEL_WORDS, Look
from bilevel.errors import (
    ArgumentError,
    DivergenceError,
    UnsupportedError,
)
from bilevel.inner.problem import BilevelProblem, Objective
from bilevel.methods.base import HypergradientMethod
from bilevel.methods.instance import Warm
from bilevel.methods.mlm import MLM
from bilevel.methods.pairing import check_pairing, check_shared
from bilevel.optim.rules import InnerOptimizer
from bilevel.outer.batches import Grouped, paired
from bilevel.outer.descent import Descent, Loop, MakeOptimizer, adam, check_factory
from bilevel.outer.keep import Keep, OnDivergence
from bilevel.outer.running import Around
from bilevel.outer.watching import ON_FAILURE, OnFailure, Progress, carrying, report, told
from bilevel.parallel import Replicas, decided, together
from bilevel.settings import Stepwise
from bilevel.solution import Hypergradient, Solution
from bilevel.tasks.problem import Evaluation
from bilevel.tree import Tree
from bilevel.updates.asking import Asking
from bilevel.updates.hessian import hessian_product
from bilevel.updates.history import History
from bilevel.updates.kept_solution import RECORDS
from bilevel.updates.tasks import Tasks

Batches = Iterable[Any] | Stepwise


@dataclass(frozen=True)
class BilevelSolver(Asking):
    """Solver of bilevel problems; swapping the method is one argument.

    Attributes:
        problem: the two objectives.
        optimizer: makes the inner steps; or a `Given` solver, in their place.
        inner_steps: their number; a `Given` solver is called once.
        method: how hypergradients are found: `MLM`, `Unrolled`, `Implicit`, `OneStep`, `Penalty`,
            `FirstOrder`.
        certificate: how they are judged, and against what: `AgainstMinimiser`, the hypergradient
            of (3) at the exact inner minimiser, or `AgainstSteps`, that of the k-step solution
            itself; None switches that off.
        on_failure: what to do where a hypergradient is not trustworthy, or a tolerance that was
            asked for is not reached.
        replicas: the processes that solve it together, each with its part of the batches; None is
            this one alone.
        micro_batches: parts of each batch, along the first axis of its tensors, that are evaluated
            one after another, so that the graph of one is held at a time. Objectives are means over
            samples, and so the same; one evaluation more is made where a step is reversed.

    Raises:
        ArgumentError: if a field is not what it should be.
        UnsupportedError: if replicas or micro-batches cannot share the problem or its optimiser.

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
    replicas: Replicas | None = None
    micro_batches: int = 1

    def __post_init__(self) -> None:
        check_kind(self.problem, BilevelProblem, "problem", "a BilevelProblem")
        rule = "an inner optimiser such as bilevel.optim.SGD(0.1) or like(torch.optim.SGD, lr=0.1)"
        check_kind(self.optimizer, InnerOptimizer, "optimizer", rule)
        check_whole(self.inner_steps, "inner_steps")
        method = "a method such as MLM() or Implicit()"
        check_kind(self.method, HypergradientMethod, "method", method)
        certificate = "AgainstMinimiser(...), AgainstSteps(...) or None"
        check_kind(self.certificate, Certifier | None, "certificate", certificate)
        check_choice(self.on_failure, ON_FAILURE, "on_failure")
        check_kind(self.replicas, Replicas | None, "replicas", "bilevel.Replicas() or None")
        check_whole(self.micro_batches, "micro_batches", 1)
        check_pairing(self.problem, self.optimizer, self.method)
        if self._among is not None:
            check_shared(self.problem, self.optimizer)

    @together
    def hypergradient(
        self,
        params: Tree,
        control: Tree,
        inner_batch: Any = None,
        outer_batch: Any = None,
        linear_batch: Any = None,
        warm: Warm | None = None,
        inner_tolerance: float | None = None,
        keep: Keep | None = None,
        resume: bool | int = False,
    ) -> Hypergradient:
        """Value and gradient of the outer objective at the inner solution.

        Args:
            params: where the inner iteration starts.
            control: the outer variable, alpha.
            inner_batch: third argument of the inner objective; constant, a `ByStep` or
                `Minibatches`.
            outer_batch: third argument of the outer objective.
            linear_batch: third argument of the inner objective where its solution is judged, and
                where `Implicit` linearises it: all data or a large batch. None is `inner_batch`;
                needed for trust if that is a `ByStep`.
            warm: of an earlier hypergradient, to go on from there instead of `params`. A problem
                with `start` always begins there, and takes the linear solution alone.
            inner_tolerance: end the inner iteration where the norm of its residual is at most this.
                `MLM`, `Unrolled` and `OneStep` differentiate the steps made: theirs goes on until
                the residual is also a hundredth of what it was at first, and from a start within
                the tolerance to the last step, since none or few do not carry the gradient.
            keep: keeps the sweep of `MLM` in a folder, its `every` counting inner steps; see
                `bilevel.adjoint`.
            resume: go on from there, or begin where the folder is empty. A sweep that had come to
                its end is not made again, its certificate is.

        Returns:
            The hypergradient, the inner solution and the certificate.

        Raises:
            StructureError: if an objective returns anything but a real scalar, or trees differ in
                structure, shape, dtype or device.
            LostGradientError: if nothing reads a part of the control, the inner objective does not
                read the params, or a function closes over a tensor that requires grad.
            DivergenceError: if something is not finite; it names the inner step where that began.
            ConvergenceError: if it is not trustworthy and `on_failure` is "raise".
            ArgumentError: if the sweep cannot go on as it was kept, where what differs is listed,
                or the method has none to keep.
            UnsupportedError: if one is to be kept by several processes.
            StorageError: if a checkpoint cannot be written or read.
        """
        instance = self._instance(
            params, control, inner_batch, outer_batch, linear_batch, warm, inner_tolerance
        )
        if keep is not None or resume is not False:
            instance = self._kept(instance, keep, resume)
        with Look(BILEVEL_WORDS, control).on():
            found = self._find(instance)
        if found.complaint is not None:
            report(found.complaint, self.on_failure)
        return found

    @together
    def hypergradients(
        self,
        params: Tree,
        control: Tree,
        outers: Sequence[Objective],
        inner_batch: Any = None,
        outer_batch: Any = None,
        linear_batch: Any = None,
        warm: Warm | None = None,
        inner_tolerance: float | None = None,
    ) -> tuple[Hypergradient, ...]:
        """Hypergradients of several outer objectives of one inner iteration, made once.

        `MLM` tapes each block once and pulls the multipliers of all objectives back together,
        `Unrolled` its graph; other methods begin at the same inner solution.

        Args:
            params: as in `hypergradient`, like the arguments that are not described here.
            control: the outer variable.
            outers: M functions `(params, control, batch) -> real scalar`, in the place of the
                `outer` of the problem.
            inner_batch: of the inner objective.
            outer_batch: of the outer ones.
            linear_batch: of the inner objective where it is judged.
            warm: to go on from.
            inner_tolerance: to end the inner iteration by.

        Returns:
            One record an objective, in their order, each with a certificate of its own. A leaf of
            the control that one of them does not reach has gradient zero there; one that none
            reaches is refused.

        Raises:
            ArgumentError: if `outers` is empty or holds no functions; and as in `hypergradient`.
        """
        if callable(outers) or not isinstance(outers, Sequence) or not outers:
            raise ArgumentError(
                "outers must be a list of at least one function (params, control, batch), got "
                f"{outers!r}."
            )
        for i, outer in enumerate(outers):
            check_kind(outer, Callable, f"outers[{i}]", "a function (params, control, batch)")
            check_arguments(outer, f"outers[{i}]", "params", "control", "batch")
        given = inner_batch, outer_batch, linear_batch, warm, inner_tolerance
        first = self._counted(self._instance(params, control, *given))
        instances = [first.beside(self._averaged(outer)) for outer in outers]
        look = Look(BILEVEL_WORDS, control)
        look.waits = True
        with look.on():
            answers = self._asked(lambda: self.method.find_each(instances), first)
            look.settled()
            pairs = zip(instances, answers, strict=True)
            found = tuple(self._judged(instance, answer) for instance, answer in pairs)
        for i, one in enumerate(found):
            if one.complaint is not None:
                report(f"outers[{i}]: {one.complaint}", self.on_failure)
        return found

    @together
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
        instance = self._instance(params, control, inner_batch, outer_batch, warm=warm)
        return instance.value()

    @together
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
        return self._instance(params, control, inner_batch, None, warm=warm).iterated

    def hvp(
        self,
        params: Tree,
        control: Tree,
        direction: Tree,
        inner_batch: Any = None,
        outer_batch: Any = None,
        linear_batch: Any = None,
        warm: Warm | None = None,
    ) -> HessianProduct:
        """The Hessian of the outer value in the control, times a direction.

        With `Implicit` of the value at the exact inner solution, by second derivatives of the
        implicit function; with `MLM` and `Unrolled` of the value after the inner steps.

        Args:
            params: as in `hypergradient`, like the other arguments.
            control: the outer variable.
            direction: like the control; None for leaves that are no variables.
            inner_batch: of the inner objective.
            outer_batch: of the outer objective.
            linear_batch: of the inner objective where it is linearised.
            warm: to go on from.

        Returns:
            Product, gradient and value.

        Raises:
            UnsupportedError: if the method has no second derivative, or there are replicas or
                micro-batches.
            StructureError: if the direction does not fit the control.
        """
        if self._among is not None:
            raise UnsupportedError(
                "hvp evaluates whole batches on one process: leave replicas= and micro_batches= "
                "out for it, or take differences of hypergradient(), which splits them."
            )
        given = tree.map_leaves(lambda x: x if tree.is_variable(x) else None, control)
        along = tree.map_leaves(lambda x: x if tree.is_variable(x) else None, direction)
        tree.check_like(along, given, "direction", "direction must be like the control")
        instance = self._instance(
            params, control, inner_batch, outer_batch, linear_batch, warm=warm
        )
        return hessian_product(instance, self.method, tree.detach(along), self.on_failure)

    @together
    def solve(
        self,
        params: Tree,
        control: Tree,
        optimizer: MakeOptimizer = adam,
        steps: int = 200,
        batches: Iterable[tuple[Any, Any]] | tuple[Batches, Batches] | None = None,
        warm_start: bool | None = None,
        accumulate: int = 1,
        evaluate: Evaluation | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        project: Callable[[Tree], Tree] | None = None,
        linear_batch: Any = None,
        inner_tolerance: float | None = None,
        tolerance: float = 0.0,
        callback: Callable[[Progress], bool | None] | None = None,
        progress: bool = False,
        warm: Warm | None = None,
        keep: Keep | None = None,
        resume: bool | int = False,
        on_divergence: OnDivergence = "raise",
    ) -> Solution:
        """Minimise the outer objective over the control, from `control`.

        Args:
            params: where the first inner iteration starts; values alone, so that a tensor in two
                places is two variables there.
            control: to begin with; it is copied, not changed. A tensor that stands in several
                places is one variable, and stays one.
            optimizer: makes a `torch.optim` optimiser of the `outer.Leaves` it is given, a list of
                tensors that knows their names; called once. `step(closure)` is used always, so that
                LBFGS works.
            steps: updates at most.
            batches: pairs (inner_batch, outer_batch), one an update and each a tuple, begun again
                when they end; or a pair (inner_loader, outer_loader), such as two DataLoaders, each
                begun again when it ends. None gives both objectives None.
            warm_start: go on from the inner state, the step count and the linear solution of the
                update before; False starts every inner iteration at `params`. None is True, but
                False with `AgainstSteps`, with several batches an update, and with an
                `inner_tolerance` where the method differentiates the steps: those are steps from
                `params`.
            accumulate: batches an update, tasks with an inner iteration each, which goes by the
                mean of their values and hypergradients and is judged by the worst of them. A leaf
                of the control that some of them do not read has gradient zero there. Of inner
                solutions and warm starts those of the last are kept.
            evaluate: how the tasks of one update are evaluated: `Looped()`, one after another, or
                `Vmapped()`, all of them in one inner iteration under `torch.func.vmap`, for batches
                of one shape; params then come back with a first axis of tasks. None is `Looped()`.
            scheduler: makes a learning-rate scheduler, stepped once an update; a
                `ReduceLROnPlateau` gets the outer objective.
            project: maps the control into its feasible set after each update.
            linear_batch: as in `hypergradient`, for all updates.
            inner_tolerance: as in `hypergradient`. A method that keeps the trajectory first
                iterates once more to find the number of steps.
            tolerance: stop when the norm of the hypergradient is at most this, if its certificate
                trusts it or there is none.
            callback: called after each update; True stops the iteration.
            progress: show a bar, by rich or tqdm.
            warm: where the first inner iteration starts instead of `params`, as `Solution.warm`
                of an earlier solve; it needs a warm start.
            keep: keeps the run in a folder, see `Keep`.
            resume: go on from the newest checkpoint of `keep`, or from that after a given update;
                begin where its folder is empty. A run that its callback had ended is over.
            on_divergence: "raise", or a `Restore` (or "restore"): go on from the last good state
                with a smaller step.

        Returns:
            The last control, the inner solution and the history.

        Raises:
            ArgumentError: if a setting is out of range, the batches are empty, or the run cannot go
                on as it was kept; settings that differ are listed.
            StorageError: if a checkpoint cannot be written or read.
            ConvergenceError: if `on_failure` is "raise", and a hypergradient is not trustworthy or
                the tolerance was not reached.
            DivergenceError: if something is not finite, the control after an update too; it names
                the outer iteration, and the inner step where that began. Whatever ends a solve
                early has the attribute `progress`, the record so far.
        """
        check_factory(optimizer)
        pairs = None if batches is None else paired(batches)
        watched = scheduler, project, tolerance, decided(self.replicas, callback), progress
        tasks = Tasks.of(self, params, linear_batch, accumulate, evaluate, pairs is not None, keep)
        pairs = Grouped(pairs, accumulate) if accumulate > 1 and pairs is not None else pairs
        loop = Loop(steps, pairs, *watched, keep, resume, on_divergence)
        warm_start = self._starts_warm(warm_start, inner_tolerance, warm, accumulate)
        descent = Descent(control, loop)
        history = History(descent, self.on_failure, getattr(self.certificate, "trust", 0.0), warm)

        look = Look(BILEVEL_WORDS, control)

        def at(alpha: Tree, batch: Any, step: int) -> tuple[float, Hypergradient]:
            warm = history.warm if warm_start else None
            look.waits = accumulate > 1
            try:
                found = tasks.found(alpha, batch, warm, inner_tolerance, step)
            except DivergenceError as error:
                raise DivergenceError(f"iteration {step}: {error}") from error
            look.settled()
            history.judge(found, step)
            return float(found.value), found

        evaluation = look.evaluated(at)
        started = {"warm_start": warm_start, "inner_tolerance": inner_tolerance}
        around = self._around(history, look, tasks, started)
        with carrying(lambda error: history.solution(params, told(error))):
            descent.run(evaluation, optimizer, history.accept, history.trusted, around)
            if descent.converged:
                history.keep(history.last)
            elif batches is None:
                evaluation(descent.control, None, len(descent.costs))
            solution = history.solution(params)
            if history.complaints:
                report(history.summary(), self.on_failure)
            if tolerance > 0 and not solution.converged:
                report(solution.reason, self.on_failure)
        return solution

    def _around(
        self,
        history: History,
        look: Look,
        tasks: Tasks,
        settings: Mapping[str, Any],
    ) -> Around | None:
        """What a descent has to know of this solver; None where nothing is kept."""
        params = tasks.params
        if not history.keeps(self.optimizer, params):
            return None
        kinds = [tree.kind(x) for x in tree.leaves_of(params)]
        alone = replace(self, replicas=None)  # a run goes on with any number of processes
        conditions = {"solver": alone, "params": kinds, "accumulate": tasks.accumulate, **settings}
        parts = {"history": history, "look": look}
        return Around(parts, conditions, RECORDS, (alone, tasks.linear_batch))

    def _starts_warm(
        self,
        warm_start: bool | None,
        inner_tolerance: float | None,
        warm: Warm | None,
        accumulate: int,
    ) -> bool:
        """Whether an update goes on from the one before; None leaves the choice to the solver."""
        check_kind(warm, Warm | None, "warm", "a Warm, such as that of a Hypergradient")
        if warm is not None and warm_start is False:
            raise ArgumentError(
                "warm is where the first inner iteration goes on from, and warm_start=False begins "
                "each of them at params: leave one of the two out."
            )
        if warm_start is not None or warm is not None:
            return warm_start is not False
        counted = inner_tolerance is not None and self._differentiates_steps
        return not (accumulate > 1 or counted or isinstance(self.certificate, AgainstSteps))
