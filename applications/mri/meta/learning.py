r"""Algorithm 3: a network for heterogeneous scans, with learned weights of the training tasks.

.. math::
    \min_\alpha \sum_j l_{v_j}(\theta(\alpha)) \quad \text{where} \quad
    \theta(\alpha) \approx \arg\min_\theta \sum_i \sigma(\alpha)_i\, l_{\tau_i}(\theta)

theta, one tree of weights a phase, moves by multipliers (Algorithm 2: the losses are costs of the
network's dynamics); alpha by the hypergradient through k such steps. The ways to compare with are
equal weights, and a penalty on the gradient of the inner problem in the place of the inner steps.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.keeping import Kept, solving
from applications.mri.meta.agreeing_descent import AgreeingDescent
from applications.mri.meta.losses import TaskLosses
from applications.mri.meta.settings import Ablation, MetaSettings
from applications.mri.meta.solvers import meta_solver, penalty_objective
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import named, on_device
from applications.mri.tasks.tasks import Tasks
from applications.mri.training.draws import Minibatches
from applications.mri.training.schedules import Cosine
from applications.processes import common, total


@dataclass(frozen=True, eq=False)
class Learned:
    """What one training found.

    Attributes:
        models: weights of the network, by the validation task they are for; under "all" where one
            model serves all.
        weights: sigma; its correlation takes `alpha`.
        alpha: of the task weights; zeros where they are equal.
        values: the outer objective before each update.
        updates: rounds of k inner steps; after each of the first ones alpha moved, see `values`.
        inner_steps: of the network.
        evaluations: spent.
        seconds: spent [s].
    """

    models: dict[str, bl.PerStep]
    weights: bl.TaskWeights
    alpha: Tensor
    values: list[float]
    updates: int
    inner_steps: int
    evaluations: int
    seconds: float

    @property
    def sigma(self) -> Tensor:
        """The learned weights, shape ``(N,)`` or ``(N, M)``."""
        return self.weights.sigma(self.alpha)


def learn(
    ablation: Ablation,
    network: Network,
    control: bl.PerStep,
    tasks: Tasks,
    settings: MetaSettings,
    report: Callable[[float], None] = lambda _share: None,
    kept: Kept | None = None,
) -> Learned:
    """Trains a network, and task weights with it.

    Args:
        ablation: how tasks are weighed.
        network: to train.
        control: weights to begin with.
        tasks: to train on and validate on.
        settings: how.
        report: told of the share of the budget that is spent.
        kept: where the training and its budget are kept; an interrupted one there goes on.

    Returns:
        Models and task weights.

    Raises:
        InputError: if a scan cannot be used.
        DivergenceError: if the training diverges.
    """
    training = _Training(network, control, tasks, settings, report, kept)
    match ablation:
        case Ablation.UNIFORM:
            return training.uniform()
        case Ablation.PENALTY:
            return training.penalised()
        case Ablation.VECTOR | Ablation.MATRIX:
            return training.weighted(matrix=ablation == Ablation.MATRIX)


class _Training:
    """One training: its losses, its minibatches, and its budget."""

    def __init__(
        self,
        network: Network,
        control: bl.PerStep,
        tasks: Tasks,
        settings: MetaSettings,
        report: Callable[[float], None],
        kept: Kept | None,
    ) -> None:
        self.kept = kept
        self.control = on_device(control, settings.device)
        self.settings, self.report = settings, report
        self.losses = TaskLosses(network, settings.loss, settings.checkpointing)
        draws = partial(
            Minibatches,
            network,
            size=settings.batch,
            crop=settings.crop,
            seed=settings.seed,
            device=settings.device,
        )
        train, validation = (tasks.sources(role, settings.seed) for role in ("train", "validation"))
        self.train = draws(train, role="train", kept=settings.inner_steps)
        self.validation = draws(validation, role="validation")
        self.names = [task.name for task in tasks.of("validation")]
        self.began, self.shared = time.monotonic(), True
        self.rates = [self.rate(0)]  # of the network, an update

    def state_dict(self) -> dict[str, Any]:
        """The budget, as far as it is spent, and the rates that hang on it."""
        spent = time.monotonic() - self.began
        return {"rates": self.rates, "evaluations": self.losses.evaluations, "seconds": spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.rates[:], self.losses.evaluations = state["rates"], state["evaluations"]
        self.began = time.monotonic() - state["seconds"]

    def opened(self, name: str) -> AbstractContextManager[bl.outer.Kept]:
        """A part of the training that is a loop of its own."""
        if self.kept is None:
            return bl.outer.opened(None)
        return bl.outer.opened(self.kept.keep(name, also=self), resume=True)

    @property
    def n_tasks(self) -> int:
        return len(self.train.sources)

    @property
    def evaluations(self) -> int:
        """Of the losses; those of all processes, where they share the tasks."""
        own = self.losses.evaluations
        return round(total(own)) if self.shared else own

    def share(self) -> float:
        """Of the budget, spent."""
        limits = self.settings
        spent = [0.0]
        if limits.evaluations is not None:
            spent.append(self.evaluations / limits.evaluations)
        if limits.seconds is not None:
            spent.append(common(time.monotonic() - self.began) / limits.seconds)
        return min(max(spent), 1.0)

    def rate(self, steps: int) -> float:
        """The learning rate of the network after so many inner steps."""
        rising = min(1.0, (steps + 1) / max(self.settings.warmup, 1))
        falling = max(Cosine().factor(self.share()), 1e-3)  # a step size must be positive
        return self.settings.learning_rate * rising * falling

    def advanced(self, steps: int) -> bool:
        """Note the end of an update that led to so many inner steps; whether all is spent."""
        self.rates.append(self.rate(steps))
        self.report(self.share())
        return self.share() >= 1

    def solver(self, weights: bl.TaskWeights) -> bl.BilevelSolver:
        """Algorithm 3 for these task weights."""
        k = self.settings.inner_steps
        # Sweeps ask for a step again: its rate must not depend on when they do.
        rate = bl.ByStep(lambda t: self.rates[(t - 1) // k])
        return meta_solver(self.losses, weights, self.settings, rate, len(self.names))

    def learned(
        self,
        models: dict[str, bl.PerStep],
        weights: bl.TaskWeights,
        alpha: Tensor,
        values: list[float],
        steps: int,
    ) -> Learned:
        spent = time.monotonic() - self.began
        updates, evaluations = len(self.rates) - 1, self.evaluations
        models = {name: on_device(model, "cpu") for name, model in models.items()}
        alpha = alpha.cpu()
        return Learned(models, weights, alpha, values, updates, steps, evaluations, spent)

    def uniform(self) -> Learned:
        """Equal weights: the inner steps alone."""
        weights = bl.TaskWeights(self.n_tasks)
        solver, alpha = self.solver(weights), weights.initial(device=self.settings.device)
        warm = self.stepped(solver, self.control, alpha, None)
        model = solver.optimizer.params(warm.state)
        return self.learned({"all": model}, weights, alpha, [], warm.steps)

    def stepped(
        self,
        solver: bl.BilevelSolver,
        start: bl.PerStep,
        alpha: Tensor,
        warm: bl.methods.Warm | None,
    ) -> bl.methods.Warm:
        """Inner steps at these task weights until all is spent."""
        trees = bl.outer.Trees(state=solver.optimizer.begin(start))

        def state() -> dict[str, Any]:
            assert warm is not None
            return {"state": trees.kept(warm.state), "steps": warm.steps}

        with self.opened("network") as kept:
            if kept.state is not None:
                state_then = trees.restored(kept.state["state"])
                warm = bl.methods.Warm(state_then, kept.state["steps"])
            while warm is None or self.share() < 1:
                warm = solver.advance(start, alpha, bl.ByStep(self.train.draw), warm)
                self.advanced(warm.steps)
                kept.after(len(self.rates) - 1, state)
            kept.end(len(self.rates) - 1, state)
        return warm

    def weighted(self, *, matrix: bool) -> Learned:
        """Learned weights, for one model or for one model a validation task."""
        settings, k = self.settings, self.settings.inner_steps
        weights = bl.TaskWeights(
            self.n_tasks,
            len(self.names) if matrix else None,
            entropy=settings.entropy,
            floor=settings.floor,
        )
        solver, start = self.solver(weights), weights.stacked(self.control)

        inner = bl.ByStep(self.train.draw)

        def after(progress: bl.outer.Progress) -> bool:
            self.advanced(k * progress.step)
            return self.share() >= settings.learn_share

        solution = solver.solve(
            start,
            weights.initial(device=self.settings.device),
            lambda leaves: AgreeingDescent(leaves, settings.outer_rate, settings.outer_clip),
            steps=10**9,
            batches=(bl.ByStep(lambda _: inner), bl.ByStep(self.validation.draw)),
            callback=after,
            **solving(self.kept, "weights", also=self),
        )
        assert solution.hypergradient is not None  # a budget allows one update at least
        warm = self.stepped(solver, start, solution.control, solution.hypergradient.warm)
        params = solver.optimizer.params(warm.state)
        models = (
            {name: column(params, j) for j, name in enumerate(self.names)}
            if matrix
            else {"all": params}
        )
        return self.learned(models, weights, solution.control, solution.values, warm.steps)

    def penalised(self) -> Learned:
        """Network and task weights descend together on `penalty_objective`, on each process."""
        settings, self.shared = self.settings, False
        weights = bl.TaskWeights(self.n_tasks, entropy=settings.entropy, floor=settings.floor)
        objective = penalty_objective(self.losses, weights, settings.penalty)
        theta = on_device(self.control, settings.device, copy=True)
        alpha = weights.initial(device=settings.device).requires_grad_()
        leaves = [leaf.requires_grad_() for leaf in named(theta).values()]
        adam = torch.optim.Adam(
            [
                {"params": [alpha], "lr": settings.penalty_rate},
                {"params": leaves, "lr": self.rates[0], "betas": (0.9, 0.99)},
            ]
        )
        values: list[float] = []

        def state() -> dict[str, Any]:
            moved = {"alpha": alpha, "theta": named(theta), "adam": adam.state_dict()}
            return {**moved, "values": values}

        with self.opened("network") as kept:
            if kept.state is not None:
                _go_on([alpha, *leaves], adam, kept.state)
                values = [*kept.state["values"]]
            while not values or self.share() < 1:
                update = len(values) + 1
                batches = self.train.draw(update), self.validation.draw(update)
                values.append(_descended(adam, lambda: objective(theta, alpha, *batches), update))  # noqa: B023
                self.advanced(update)
                adam.param_groups[1]["lr"] = self.rates[-1]
                kept.after(update, state)
            kept.end(len(values), state)
        return self.learned({"all": theta}, weights, alpha.detach(), values, len(values))


def _go_on(leaves: list[Tensor], adam: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Set task weights, those of the network, and moments to what was kept."""
    with torch.no_grad():
        values = [state["alpha"], *state["theta"].values()]
        for leaf, value in zip(leaves, values, strict=True):
            leaf.copy_(value)
    adam.load_state_dict(state["adam"])


def _descended(adam: torch.optim.Adam, objective: Callable[[], Tensor], update: int) -> float:
    """The penalised objective before a step of Adam on it."""
    adam.zero_grad()
    try:
        value = objective()
    except bl.errors.DivergenceError as error:
        raise bl.errors.DivergenceError(f"iteration {update}: {error}") from error
    value.backward()
    finite = _finite(value.detach(), update)
    adam.step()
    return finite


def _finite(value: Tensor, update: int) -> float:
    if not value.isfinite():
        raise bl.errors.DivergenceError(
            f"iteration {update}: the penalised objective is {value.item()}; take a smaller "
            "learning rate, or a smaller penalty."
        )
    return float(value)


def column(stacked: bl.PerStep, j: int) -> bl.PerStep:
    """One model of those of a matrix of weights.

    Args:
        stacked: weights with a leading axis.
        j: which.

    Returns:
        Its weights.
    """
    steps = [{name: x[j] for name, x in step.items()} for step in stacked.steps]
    return bl.PerStep(steps, {name: x[j] for name, x in stacked.initial.items()})
