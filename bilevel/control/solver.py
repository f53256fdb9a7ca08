"""Algorithm 2: forward sweep, multiplier sweep, one step of a torch optimiser with equation (8)."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import autodiff, tree
from bilevel.checks import check_arguments, check_choice, check_kind, check_whole
from bilevel.control.adjoint import Adjoint, adjoint
from bilevel.control.kept_sweep import Sweeps, check_within
from bilevel.control.lagrangian import KKT, kkt
from bilevel.control.newton_cg import NewtonCG, NewtonRun
from bilevel.control.optimum import Optima, Optimum, optimum_of
from bilevel.control.riccati.settings import Riccati
from bilevel.control.riccati.solving import Laid, Solved
from bilevel.control.rollout import total_cost
from bilevel.control.second_order import by_riccati, iterated
from bilevel.control.solution import BatchSolution, ControlSolution
from bilevel.dynamics.per_step import CONTROL_WORDS, Look
from bilevel.dynamics.problem import ControlProblem
from bilevel.dynamics.steps import first_infinite
from bilevel.errors import ArgumentError, LostGradientError, UnsupportedError
from bilevel.outer.batches import Grouped
from bilevel.outer.descent import Descent, Loop, MakeOptimizer, adam, check_factory, check_finite
from bilevel.outer.keep import Keep, OnDivergence
from bilevel.outer.running import Around
from bilevel.outer.watching import ON_FAILURE, OnFailure, Progress, carrying, report, told
from bilevel.parallel import Portion, Replicas, Shares, check_mean, decided, own, together
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import RandomState, devices_of
from bilevel.tree import Tree

Build = Callable[[Any], tuple[ControlProblem, Tree]]  # batch -> (problem, observation)


@dataclass(frozen=True)
class ControlSolver:
    """Solver of control problems by first-order methods, Newton-CG or the Riccati sweep.

    Attributes:
        problem: a `ControlProblem`, or `build(batch) -> (ControlProblem, observation)` for data
            that comes in batches.
        optimizer: makes a `torch.optim` optimiser of the `outer.Leaves` it is given, a list of
            tensors that knows their names; called once a solve. `step(closure)` is used always, so
            that LBFGS works. Or a `NewtonCG`, or a `Riccati`.
        checkpointing: of the sweeps; None is `Checkpointing()`. A `Budget` is planned once in a
            solve for all batches whose observations agree in structure, shape, dtype and device.
        on_failure: what to do when a tolerance was asked for and not reached.
        replicas: the processes that solve it together, each with its part of the batches, or of the
            batches of an update; one problem each builds for itself. None is this one alone, as
            `Riccati` and `optimum` need it.

    Raises:
        ArgumentError: if a field is not what it should be.
        UnsupportedError: if replicas are to share a Riccati sweep.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda state, control, t: state + control),
        ...     terminal=lambda state, control: state**2 / 2,
        ...     running=lambda state, control, t: control**2 / 2,
        ...     horizon=3,
        ... )
        >>> solver = ControlSolver(problem, lambda p: torch.optim.SGD(p, 0.1))
        >>> found = solver.solve(torch.tensor(0.0), torch.tensor(4.0), steps=100)
        >>> round(float(found.control), 5)  # theta* = -x0 / (T + 1)
        -1.0
    """

    problem: ControlProblem | Build
    optimizer: MakeOptimizer | NewtonCG | Riccati = adam
    checkpointing: Checkpointing | Budget | None = None
    on_failure: OnFailure = "warn"
    replicas: Replicas | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.problem, ControlProblem) or callable(self.problem)):
            raise ArgumentError(
                "problem must be a ControlProblem or a function build(batch) -> (ControlProblem, "
                f"observation), got {type(self.problem).__name__}."
            )
        if not isinstance(self.problem, ControlProblem):
            check_arguments(self.problem, "build", "batch")
        if not isinstance(self.optimizer, NewtonCG | Riccati):
            if self.optimizer in (NewtonCG, Riccati):
                check_kind(self.optimizer, NewtonCG | Riccati, "optimizer", "an instance")
            check_factory(self.optimizer)
        if isinstance(self.optimizer, Riccati) and self.checkpointing is not None:
            raise ArgumentError(
                "Riccati keeps every step's derivatives, got checkpointing= beside: leave it out, "
                "or take NewtonCG."
            )
        check_choice(self.on_failure, ON_FAILURE, "on_failure")
        check_kind(self.replicas, Replicas | None, "replicas", "bilevel.Replicas() or None")
        if isinstance(self.optimizer, Riccati) and self.replicas is not None:
            raise UnsupportedError(
                "Riccati sweeps on one process, and so does optimum(): leave replicas= out, or "
                "take NewtonCG() or an optimiser of torch, whose costs processes share."
            )

    @together
    def solve(
        self,
        control: Tree,
        observation: Tree = None,
        *,
        steps: int = 100,
        batches: Iterable[Any] | None = None,
        accumulate: int = 1,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        project: Callable[[Tree], Tree] | None = None,
        tolerance: float = 0.0,
        callback: Callable[[Progress], bool | None] | None = None,
        progress: bool = False,
        keep: Keep | None = None,
        resume: bool | int = False,
        on_divergence: OnDivergence = "raise",
    ) -> ControlSolution | BatchSolution:
        """Minimise J over the control, from `control`.

        Args:
            control: Theta to begin with; it is copied, not changed. A tensor that stands in several
                places is one variable, and stays one.
            observation: f, if the solver holds one problem.
            steps: updates at most.
            batches: what `build` gets; begun again when it ends.
            accumulate: batches an update, which goes by the mean of their costs and gradients; one
                is swept at a time.
            scheduler: makes a learning-rate scheduler, stepped once an update; a
                `ReduceLROnPlateau` gets the cost.
            project: maps the control into its feasible set after each update.
            tolerance: stop when the norm of (8) is at most this.
            callback: called after each update; True stops the iteration.
            progress: show a bar, by rich or tqdm.
            keep: keeps the run in a folder, see `Keep`.
            resume: go on from the newest checkpoint of `keep`, or from that after a given update;
                begin where its folder is empty. A run that its callback had ended is over.
            on_divergence: "raise", or a `Restore` (or "restore"): go on from the last good state
                with a smaller step.

        Returns:
            The last control and the history; a `BatchSolution` by `Riccati(batched=True)`.

        Raises:
            ArgumentError: if batches are missing, empty, or given without `build`, `steps` or
                `tolerance` is negative, there is nothing to accumulate, or the run cannot go on
                as it was kept; settings that differ are listed.
            StorageError: if a checkpoint cannot be written or read.
            ConvergenceError: if the tolerance was not reached and `on_failure` is "raise".
            DivergenceError: if cost, gradient or control are not finite; it names where that began.
                Whatever ends a solve early has the attribute `progress`, the record so far.
        """
        if isinstance(self.problem, ControlProblem) == (batches is not None):
            raise ArgumentError(
                "batches go with a solver that holds build(batch); a solver that holds one "
                "ControlProblem takes an observation instead."
            )
        self._check_accumulation(accumulate)
        if isinstance(self.optimizer, Riccati) or self.replicas is not None:
            check_within(keep, f"{type(self.optimizer).__name__} or replicas")
        if accumulate > 1 and batches is not None:
            batches = Grouped(batches, accumulate)
        if self.replicas is not None and batches is not None:
            batches = Shares(self.replicas, batches, accumulate)
        watched = scheduler, project, tolerance, decided(self.replicas, callback), progress
        loop = Loop(steps, batches, *watched, keep, resume, on_divergence)
        if isinstance(self.optimizer, Riccati):
            given = self.optimizer, self.problem, control, observation, loop
            return by_riccati(*given, self.on_failure)
        descent = Descent(control, loop)
        sweeps, look = Sweeps(self.checkpointing, keep), Look(CONTROL_WORDS, control)
        evaluate = partial(self._evaluate, sweeps, observation, accumulate)
        make: Any = self.optimizer
        run = None
        if isinstance(make, NewtonCG):
            random = RandomState.capture(devices_of((observation, control)))
            given, swept = partial(self._given, observation), partial(self._adjoint, sweeps)
            run = NewtonRun(make, given, swept, self.checkpointing, random, look, self.replicas)
            evaluate, make = run.evaluate, run.optimizer
        around = self._around(look, run, observation, accumulate)
        with carrying(lambda error: _solution(descent, told(error))):
            descent.run(look.evaluated(evaluate), make, around=around)
            random = None if run is None else run.random
            bent = run is not None and batches is None and _stands(descent)
            curvature = run.negative_curvature() if run is not None and bent else 0.0
            last = look.evaluated(self._final)
            final, residuals = last(descent, observation, sweeps, random)
            solution = _solution(descent, "", final, residuals)
            if run is not None:
                solution = replace(solution, products=run.products)
            if curvature < 0:
                solution = replace(
                    solution, converged=False, reason=_no_minimum(solution.gradient_norm, curvature)
                )
            if tolerance > 0 and not solution.converged:
                report(solution.reason, self.on_failure)
        return solution

    def _around(
        self, look: Look, run: NewtonRun | None, observation: Tree, accumulate: int
    ) -> Around:
        """What a descent that is kept has to know of this solver."""
        kinds = [tree.kind(x) for x in tree.leaves_of(observation)]
        alone = replace(self, replicas=None)  # a run goes on with any number of processes
        conditions = {"solver": alone, "observation": kinds, "accumulate": accumulate}
        parts = {"look": look} if run is None else {"look": look, "newton": run}
        return Around(parts, conditions, {}, (alone, observation))

    def optimum(
        self,
        parameters: Tree,
        observation: Tree,
        control: Tree = None,
        *,
        steps: int = 100,
        tolerance: float = 0.0,
    ) -> Optimum:
        """The optimal control of `build(parameters)`, as a differentiable function.

        Derivatives in `parameters` and `observation`, forward and reverse and of any order, cost
        one more sweep each with the factors of the last one; bounds and constraints that are active
        stay so. The graph never goes through the iteration.

        Args:
            parameters: tree that `build(parameters) -> ControlProblem` takes; shared by a batch.
            observation: f.
            control: Theta to begin with; the optimum of a problem nearby is a good one. May be left
                out where `build` returns it, as a pair `(problem, control)`.
            steps: iterations at most.
            tolerance: for the norm of the gradient; 0 is that of the settings.

        Returns:
            Control, states and cost, attached to the graphs of both arguments.

        Raises:
            ArgumentError: if the solver has no `build` or another optimiser than `Riccati`.
            ConvergenceError: if the optimum is no strict minimum, or was not reached and
                `on_failure` is "raise".
            LostGradientError: if a derivative in bounds or constraints would be lost.
            UnsupportedError: if more than 2000 constraints are active.

        Example:
            >>> import torch, bilevel as bl
            >>> def build(weight):
            ...     return bl.ControlProblem(
            ...         bl.Map(lambda state, control, t: state + control),
            ...         terminal=lambda state, control: weight * state**2 / 2,
            ...         running=lambda state, control, t: control**2 / 2,
            ...         horizon=1,
            ...     )
            >>> weight = torch.tensor(3.0, requires_grad=True)
            >>> start = bl.PerStep.unstack(torch.zeros(1))
            >>> solver = bl.ControlSolver(build, bl.Riccati())
            >>> best = solver.optimum(weight, torch.tensor(4.0), start)
            >>> best.control.steps[0].backward()  # -4 w / (1 + w)
            >>> best.control.steps[0].detach(), weight.grad
            (tensor(-3.), tensor(-0.2500))
        """
        settings, build = self.optimizer, self.problem
        if not isinstance(settings, Riccati) or isinstance(build, ControlProblem):
            raise ArgumentError(
                "optimum needs ControlSolver(build, Riccati()) with build(parameters) -> "
                f"ControlProblem, got {type(build).__name__} and {type(settings).__name__}."
            )
        if any(map(autodiff.followed, tree.leaves_of(settings.bounds))):
            raise LostGradientError(
                "bounds= are settings, in which optimum has no derivative, got one that requires "
                "grad or is being differentiated: detach it, or give it as a constraint on a state "
                "that holds it."
            )
        loop = Loop(steps, tolerance=tolerance)
        build, control = _beginning(build, parameters, control)

        def solve(laid: Laid, observation: Tree) -> tuple[Solved, Any]:
            # What is no failure is told once, where the caller stands.
            at_once = "raise" if self.on_failure == "raise" else "ignore"
            return iterated(settings, laid, observation, loop, at_once)

        optima = Optima(build, settings, solve, self.on_failure)
        return optimum_of(optima, parameters, observation, control)

    def _final(
        self, descent: Descent, observation: Tree, sweeps: Sweeps, random: RandomState | None
    ) -> tuple[Adjoint | None, KKT | None]:
        """Of one problem, everything is evaluated at the last control."""
        if not isinstance(self.problem, ControlProblem):
            return None, None
        problem, control, steps = self.problem, descent.control, len(descent.costs)
        random = random or RandomState.capture(devices_of((observation, control)))
        random.restore()
        final = self._adjoint(sweeps, problem, observation, control, steps, keep=True)
        random.restore()  # so that steps which draw at random draw what they drew
        states, multipliers = final.states or [], final.multipliers or []
        if self.replicas is not None:  # states and multipliers are those of this process
            return final, None
        residuals = kkt(problem, observation, control, states, multipliers)
        if descent.leaves.tied:  # the condition is on the sum over its places
            norm = tree.norm(descent.leaves.gathered(final.gradient))
            residuals = replace(residuals, stationarity=norm)
        return final, residuals

    def _check_accumulation(self, accumulate: Any) -> None:
        """Refuse anything but a number of batches, and more than one where there are none."""
        check_whole(accumulate, "accumulate", 1)
        one = isinstance(self.problem, ControlProblem) or isinstance(self.optimizer, NewtonCG)
        if accumulate > 1 and one:
            raise ArgumentError(
                "accumulate needs a solver that holds build(batch) and a first-order optimiser, "
                f"got accumulate={accumulate} without; leave it at 1."
            )

    def _given(self, observation: Tree, batch: Any) -> tuple[ControlProblem, Tree]:
        if isinstance(self.problem, ControlProblem):
            return self.problem, observation
        return self.problem(own(batch))

    def _evaluate(
        self,
        sweeps: Sweeps,
        observation: Tree,
        accumulate: int,
        control: Tree,
        batch: Any,
        step: int,
    ) -> tuple[float, Adjoint]:
        if self.replicas is not None:
            self._compare(self.replicas, control, batch)
        batches = [batch] if accumulate == 1 else batch
        each = (
            self._adjoint(sweeps, *self._given(observation, b), control, step, i)
            for i, b in enumerate(batches)
        )
        if accumulate == 1:
            found = next(each)
        else:
            found = _mean(each)
            norm = tree.norm(found.gradient)
            check_finite(float(found.cost), norm, step, lambda: "that of each batch is finite")
        return float(found.cost), found

    def _compare(self, replicas: Replicas, control: Tree, batch: Any) -> None:
        """Refuse what must be the same on every process and is not."""
        replicas.begin({"problem": self.problem}, {"control": control})
        build = self._given

        def cost(one: Any) -> Tensor:
            return total_cost(*build(None, one), tree.detach(control))

        if isinstance(batch, Portion):
            parts = [batch.part], batch.whole
            check_mean(replicas, "the cost", cost, parts, control, self.problem)

    def _adjoint(
        self,
        sweeps: Sweeps,
        problem: ControlProblem,
        observation: Tree,
        control: Tree,
        step: int,
        of_update: int = 0,
        keep: bool = False,
    ) -> Adjoint:
        found = adjoint(
            problem,
            observation,
            control,
            keep_states=keep,
            keep_multipliers=keep,
            **sweeps.of(problem, observation, control, (step, of_update, keep)),
        )
        if self.replicas is not None:
            cost, gradient = self.replicas.mean_of((found.cost, found.gradient))
            found = replace(found, cost=cost, gradient=gradient)
        norm = tree.norm(found.gradient)
        check_finite(float(found.cost), norm, step, lambda: _where(problem, observation, control))
        return found


def _where(problem: ControlProblem, observation: Tree, control: Tree) -> str:
    """Which state is the first that is not finite."""
    given = tree.detach(observation), tree.detach(control)
    t = first_infinite(problem.dynamics, *given, problem.horizon)
    if t is None:
        return "every state is finite, so a cost or a derivative is not"
    return f"u({t}) is the first state that is not finite"


def _stands(descent: Descent) -> bool:
    """Whether an iteration ended at a point that should be a minimum."""
    cost, norm, _ = descent.last or (math.nan, math.nan, None)
    flat = descent.standstill and norm <= 1e-6 * (1 + abs(cost))
    return flat or descent.converged or norm <= descent.loop.tolerance


def _no_minimum(norm: float, curvature: float) -> str:
    return (
        f"the gradient norm is {norm:.3g}, but this stationary point is no minimum: the Hessian "
        f"has negative curvature, {-curvature:.2g} of the largest that was seen; begin elsewhere."
    )


def _solution(
    descent: Descent, reason: str, final: Adjoint | None = None, residuals: KKT | None = None
) -> ControlSolution:
    """The record of a descent; `reason` is what ended it early, if anything."""
    cost, norm, _ = descent.last or (math.nan, math.nan, None)
    tolerance, converged = descent.loop.tolerance, descent.converged
    if final is not None:
        cost, norm = float(final.cost), tree.norm(descent.leaves.gathered(final.gradient))
        converged = norm <= tolerance if tolerance > 0 else converged
    steps = len(descent.costs)
    return ControlSolution(
        descent.control,
        cost,
        norm,
        descent.costs,
        descent.gradient_norms,
        steps,
        converged and not reason,
        reason or descent.ending(norm, converged=converged, judged="it is exact but for rounding"),
        final,
        residuals,
    )


def _mean(found: Iterator[Adjoint]) -> Adjoint:
    """The mean of costs and gradients, while one record is held at a time."""
    total, n = next(found), 1
    for n, one in enumerate(found, 2):  # noqa: B007
        total = replace(
            one,
            cost=total.cost + one.cost,
            gradient=tree.add(total.gradient, one.gradient),
            forward_steps=total.forward_steps + one.forward_steps,
        )
    gradient = tree.map_leaves(lambda x: None if x is None else x / n, total.gradient)
    return replace(total, cost=total.cost / n, gradient=gradient)


def _beginning(build: Any, parameters: Tree, control: Tree) -> tuple[Any, Tree]:
    """What builds the problem of parameters, and the control to begin with."""
    made = build(tree.detach(parameters))
    if not isinstance(made, tuple):
        if control is not None:
            return build, control
        raise ArgumentError(
            "optimum needs a control to begin with, which tells its shapes: pass control=, such as "
            "PerStep([torch.zeros(2) for _ in range(horizon)]), or let build return the pair "
            f"(problem, control), got {type(made).__name__} alone."
        )
    if len(made) != 2 or not isinstance(made[0], ControlProblem):
        kinds = ", ".join(type(part).__name__ for part in made)
        raise ArgumentError(f"build must return a problem, or (problem, control), got ({kinds}).")
    return lambda given: build(given)[0], made[1] if control is None else control
