"""Trains the network by Algorithm 2 on fully sampled scans, or on undersampled ones alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import SliceDataset
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import named, on_device, restored
from applications.mri.training.draws import Pool, Rounds, Source
from applications.mri.training.examples import Example, moved
from applications.mri.training.precision import in_precision
from applications.mri.training.self_supervised import draw_split
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.validation import Look, Looks, mean_cost
from applications.processes import common, present

__all__ = ["TrainingResult", "TrainingSettings", "TrainingState", "train"]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What is known after an update.

    Attributes:
        step: updates done.
        share: of the training that is spent, in [0, 1].
        cost: mean loss of this update's slices, before it.
        rate: learning rate of this update.
        look: at the validation slices, after this update; None if there was none.
        control: the present weights; they share memory with the training.
        kept: what the training would return: the best weights if there is validation, else the
            present ones.
    """

    step: int
    share: float
    cost: float
    rate: float
    look: Look | None
    control: bl.PerStep
    kept: bl.PerStep


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """The outcome.

    Attributes:
        control: the weights at the least validation cost, or the last ones without validation.
        costs: mean loss of each update's slices, those before a resumption included.
        looks: at the validation slices.
        seconds: time spent [s], that before a resumption included.
        stopped: whether patience ended it.
    """

    control: bl.PerStep
    costs: list[float]
    seconds: float
    looks: tuple[Look, ...] = ()
    stopped: bool = False


AfterStep = Callable[[TrainingState], None]


def train(
    network: Network,
    begin: bl.PerStep,
    slices: SliceDataset | Sequence[Source],
    settings: TrainingSettings,
    after_step: AfterStep | None = None,
    validation: SliceDataset | Sequence[Source] | None = None,
    keep: bl.Keep | None = None,
) -> TrainingResult:
    """Algorithm 2 over slices drawn at random.

    Args:
        network: to train; scans of other coil counts get its own, see `coil_counts`.
        begin: weights to begin with.
        slices: fully sampled; undersampled for self-supervision. Sources come with samplings of
            their own in place of those of the settings.
        settings: how.
        after_step: told of every update; it may save the weights.
        validation: slices to choose the weights by, and to stop by; the masks are the
            same at each look.
        keep: where the training is kept; if it holds one that was interrupted, under the same
            conditions, that goes on as if it had not been.

    Returns:
        The best or last weights and the history.

    Raises:
        ArgumentError: if it was kept under other conditions; they are listed.
        InputError: if a scan does not fit the training, or patience has no slices to look at.
        DivergenceError: if the loss or its gradient is not finite.
    """
    pool, looked_at = (
        Pool([Source(one, settings.samplings)] if isinstance(one, SliceDataset) else one)
        for one in (slices, validation or ())
    )
    if settings.validation.patience is not None and not looked_at:
        raise InputError(
            f"patience of {settings.validation.patience} looks needs validation slices, got none; "
            "name a folder of them, or set patience to None."
        )
    training = _Training(network, begin, pool, looked_at, settings, after_step, keep)
    if looked_at:  # what does not fit shall not show hours later, at the first look
        training.draw(*looked_at[0], torch.Generator(), looking=True)
    return training.run()


def _shared(settings: TrainingSettings) -> bl.Replicas | None:
    """The processes that share the slices of an update."""
    replicas = present(split=True)
    if replicas is not None and settings.accumulate % replicas.size:
        raise InputError(
            f"{replicas.size} processes need a multiple of {replicas.size} slices an update, got "
            f"accumulate {settings.accumulate}; raise --accumulate."
        )
    return replicas


class _Training:
    """A training under way."""

    def __init__(
        self,
        network: Network,
        begin: bl.PerStep,
        slices: Pool,
        validation: Pool,
        settings: TrainingSettings,
        after_step: AfterStep | None,
        keep: bl.Keep | None,
    ) -> None:
        self.network, self.settings = network, settings
        self.replicas = _shared(settings)
        self.after_step, self.validation = after_step, validation
        self.keep = keep and replace(keep, also=self)
        self.control = on_device(begin, settings.device)
        self.costs: list[float] = []
        self.looks = Looks()
        self.started = time.monotonic()
        self.examples = Rounds(slices, self.draw, settings.seed)
        self.rate = settings.rate(0, 0.0)

    def run(self) -> TrainingResult:
        settings = self.settings
        solver = bl.ControlSolver(
            self.build, self.optimizer, settings.checkpointing, replicas=self.replicas
        )
        control = solver.solve(
            self.control,
            steps=settings.steps or 10**9,
            batches=self.examples,
            accumulate=settings.accumulate,
            callback=self.advance,
            keep=self.keep,
            resume=self.keep is not None,
        ).control
        kept = on_device(self.looks.best or control, "cpu")
        seconds = time.monotonic() - self.started
        return TrainingResult(kept, self.costs, seconds, self.looks.all, self.exhausted)

    def state_dict(self) -> dict[str, Any]:
        """What the training knows beside its weights and their moments."""
        best = self.looks.best
        return {
            "costs": self.costs,
            "looks": [(look.step, look.cost) for look in self.looks.all],
            "best": None if best is None else named(best),
            "seconds": time.monotonic() - self.started,
            "rate": self.rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        best = None if state["best"] is None else restored(state["best"], self.control)
        self.costs, self.rate = [*state["costs"]], state["rate"]
        self.looks = Looks(tuple(Look(*one) for one in state["looks"]), best)
        self.started = time.monotonic() - state["seconds"]

    @property
    def exhausted(self) -> bool:
        return self.looks.exhausted(self.settings.validation.patience)

    def share(self) -> float:
        steps, seconds = self.settings.steps, self.settings.seconds
        by_steps = len(self.costs) / steps if steps else 0.0
        by_time = common(time.monotonic() - self.started) / seconds if seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def draw(
        self,
        source: Source,
        index: int,
        generator: torch.Generator,
        *,
        looking: bool = False,
    ) -> Example:
        settings = self.settings
        if settings.self_supervision is not None:
            return draw_split(source.slices[index], generator, settings.self_supervision)
        whole = looking or self.share() >= 1 - settings.whole
        crop = 0 if whole else settings.crop
        return source.example(index, generator, crop, flips=not looking)

    def build(self, example: Example) -> tuple[bl.ControlProblem, Tensor]:
        device, precision = self.settings.device, self.settings.precision
        problem, start = moved(example, device).problem(self.network, self.settings.loss)
        return in_precision(problem, precision, device), start

    def optimizer(self, leaves: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(leaves, self.rate, betas=(0.9, 0.99))

    def advance(self, progress: bl.outer.Progress) -> bool:
        settings, control, used = self.settings, progress.control, self.rate
        self.costs.append(progress.cost)
        done, spent = len(self.costs), self.share()
        self.rate = settings.rate(done, spent)
        for group in progress.optimizer.param_groups:
            group["lr"] = self.rate
        look = self.look(done, spent, control)
        if self.after_step is not None:
            kept = self.looks.best or control
            self.after_step(TrainingState(done, spent, progress.cost, used, look, control, kept))
        return spent >= 1.0 or self.exhausted

    def look(self, done: int, spent: float, control: bl.PerStep) -> Look | None:
        settings, slices = self.settings, self.validation
        if not slices or (done % settings.validation.every and spent < 1.0):
            return None
        generator = torch.Generator().manual_seed(settings.seed + 1)
        drawn = (self.draw(*one, generator, looking=True) for one in slices)
        look = Look(done, mean_cost(self.build, drawn, control))
        self.looks = self.looks.after(look, on_device(control, settings.device, copy=True))
        return look
