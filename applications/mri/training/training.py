"""Trains the network by Algorithm 2 on fully sampled scans, or on undersampled ones alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import SliceDataset
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import on_device
from applications.mri.training.draws import Pool, Rounds, Source
from applications.mri.training.examples import Example, moved
from applications.mri.training.precision import in_precision
from applications.mri.training.resuming import Snapshot
from applications.mri.training.self_supervised import draw_split
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.validation import Look, Looks, mean_cost

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
        snapshot: makes a copy of all that an exact resumption needs; valid until the next update.
    """

    step: int
    share: float
    cost: float
    rate: float
    look: Look | None
    control: bl.PerStep
    kept: bl.PerStep
    snapshot: Callable[[], Snapshot]


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
    begin: bl.PerStep | Snapshot,
    slices: SliceDataset | Sequence[Source],
    settings: TrainingSettings,
    after_step: AfterStep | None = None,
    validation: SliceDataset | Sequence[Source] | None = None,
) -> TrainingResult:
    """Algorithm 2 over slices drawn at random.

    Args:
        network: to train; scans of other coil counts get its own, see `coil_counts`.
        begin: weights to begin with, or a snapshot to go on from; with the settings and slices it
            was taken under, the training goes on as if it had not been interrupted.
        slices: fully sampled; undersampled for self-supervision. Sources come with samplings of
            their own in place of those of the settings.
        settings: how.
        after_step: told of every update; it may save the weights.
        validation: slices to choose the weights by, and to stop by; the masks are the
            same at each look.

    Returns:
        The best or last weights and the history.

    Raises:
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
    training = _Training(network, begin, pool, looked_at, settings, after_step)
    if looked_at:  # what does not fit shall not show hours later, at the first look
        training.draw(*looked_at[0], torch.Generator(), looking=True)
    return training.run()


class _Training:
    """A training under way."""

    def __init__(
        self,
        network: Network,
        begin: bl.PerStep | Snapshot,
        slices: Pool,
        validation: Pool,
        settings: TrainingSettings,
        after_step: AfterStep | None,
    ) -> None:
        self.network, self.settings = network, settings
        self.after_step, self.validation = after_step, validation
        place = None
        if isinstance(begin, Snapshot):
            place, self.moments = begin.place, begin.moments
            self.costs, self.looks, spent = list(begin.costs), begin.looks, begin.seconds
            begin = begin.control
        else:
            self.moments, self.costs, self.looks, spent = None, [], Looks(), 0.0
        self.control = on_device(begin, settings.device)
        self.started = time.monotonic() - spent
        self.examples = Rounds(slices, self.draw, settings.seed, place)
        self.rate = settings.rate(len(self.costs), self.share())

    def run(self) -> TrainingResult:
        settings, control = self.settings, self.control
        if self.share() < 1.0 and not self.exhausted:
            solver = bl.ControlSolver(self.build, self.optimizer, settings.checkpointing)
            control = solver.solve(
                control,
                steps=settings.steps - len(self.costs) if settings.steps else 10**9,
                batches=self.examples,
                accumulate=settings.accumulate,
                callback=self.advance,
            ).control
        kept = on_device(self.looks.best or control, "cpu")
        seconds = time.monotonic() - self.started
        return TrainingResult(kept, self.costs, seconds, self.looks.all, self.exhausted)

    @property
    def exhausted(self) -> bool:
        return self.looks.exhausted(self.settings.validation.patience)

    def share(self) -> float:
        steps, seconds = self.settings.steps, self.settings.seconds
        by_steps = len(self.costs) / steps if steps else 0.0
        by_time = (time.monotonic() - self.started) / seconds if seconds else 0.0
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
        adam = torch.optim.Adam(leaves, self.rate, betas=(0.9, 0.99))
        if self.moments is not None:
            # Adam would go on in the very tensors that it is given.
            state = {k: {n: v.clone() for n, v in m.items()} for k, m in self.moments.items()}
            adam.load_state_dict({**adam.state_dict(), "state": state})
        return adam

    def advance(self, progress: bl.outer.Progress) -> bool:
        settings, control, used = self.settings, progress.control, self.rate
        self.costs.append(progress.cost)
        done, spent = len(self.costs), self.share()
        self.rate = settings.rate(done, spent)
        for group in progress.optimizer.param_groups:
            group["lr"] = self.rate
        look = self.look(done, spent, control)
        if self.after_step is not None:
            kept, snapshot = self.looks.best or control, partial(self.snapshot, progress)
            self.after_step(
                TrainingState(done, spent, progress.cost, used, look, control, kept, snapshot)
            )
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

    def snapshot(self, progress: bl.outer.Progress) -> Snapshot:
        moments = progress.optimizer.state_dict()["state"]
        return Snapshot(
            on_device(progress.control, "cpu", copy=True),
            {k: {n: v.detach().cpu().clone() for n, v in m.items()} for k, m in moments.items()},
            self.examples.place,
            time.monotonic() - self.started,
            tuple(self.costs),
            self.looks,
        )
