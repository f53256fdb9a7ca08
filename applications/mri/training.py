"""Trains the network on fully sampled scans by Algorithm 2, undersampling them on the way."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import Slice, SliceDataset, fully_sampled
from applications.mri.operators import fft2c, ifft2c, rss
from applications.mri.reconstruction import Loss, Network
from applications.mri.sampling import CartesianRandom, Sampling, samples_columns


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        samplings: one of them, drawn at random, undersamples each slice; repeat one to favour it.
        steps: updates at most; None: as many as `seconds` allow.
        seconds: time at most [s]; None: as long as `steps` take.
        learning_rate: of Adam at its peak; it rises over `warmup` updates and falls to 0 as a
            cosine of the share of steps or time that is spent.
        warmup: updates.
        crop: image rows of a training crop [pixels]; 0 trains on whole slices. Masks that sample
            whole columns alias along columns only, so that a crop of rows is a smaller scan of the
            same kind, at a fraction of the time; slices with other masks are trained on whole.
        whole: last share of the training, in [0, 1], that sees whole slices.
        loss: weights of the terms.
        checkpointing: of the sweeps.
        seed: of slices, crops, flips and masks.

    Raises:
        InputError: if neither steps nor seconds limit the training, or a setting is out of range.
    """

    samplings: tuple[Sampling, ...] = (CartesianRandom(4.0, 0.08),)
    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 3e-3
    warmup: int = 20
    crop: int = 0
    whole: float = 0.2
    loss: Loss = field(default_factory=Loss)
    checkpointing: bl.Checkpointing = field(default_factory=bl.Checkpointing)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.samplings:
            raise InputError("samplings must hold at least one sampling, got none.")
        if self.steps is None and self.seconds is None:
            raise InputError("the training needs a number of steps or of seconds, got neither.")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, or None, got {self.steps}.")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds must be > 0, or None, got {self.seconds}.")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be > 0, got {self.learning_rate}.")
        if self.crop < 0 or self.warmup < 0 or not 0 <= self.whole <= 1:
            raise InputError(
                f"crop and warmup must be >= 0 and whole in [0, 1], got {self.crop}, "
                f"{self.warmup} and {self.whole}."
            )


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What is known after an update.

    Attributes:
        step: updates done.
        share: of the training that is spent, in [0, 1].
        cost: loss of this update's slice.
        control: the present weights; they share memory with the training.
    """

    step: int
    share: float
    cost: float
    control: bl.PerStep


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """The outcome.

    Attributes:
        control: the last weights.
        costs: loss of each update.
        seconds: time spent [s].
    """

    control: bl.PerStep
    costs: list[float]
    seconds: float


@dataclass(frozen=True, eq=False)
class _Example:
    target: Tensor  # fully sampled coil images, (coils, rows, columns)
    reference: Tensor
    mask: Tensor
    rows: slice  # what of it is trained on


def train(
    network: Network,
    control: bl.PerStep,
    slices: SliceDataset,
    settings: TrainingSettings,
    after_step: Callable[[TrainingState], None] | None = None,
) -> TrainingResult:
    """Algorithm 2 over slices drawn at random, one an update.

    Args:
        network: to train.
        control: weights to begin with.
        slices: fully sampled.
        settings: how.
        after_step: told of every update; it may save the weights.

    Returns:
        The last weights and the history.

    Raises:
        InputError: if a scan is undersampled, or has another coil count than the network.
        DivergenceError: if the loss or its gradient is not finite.
    """
    for file in slices.files:
        if file.n_coils != network.architecture.n_coils:
            raise InputError(
                f"{file.path}: the network was built for {network.architecture.n_coils} coils, the "
                f"scan has {file.n_coils}; train a network for that count."
            )
    started = time.monotonic()
    done = 0

    def share() -> float:
        by_steps = done / settings.steps if settings.steps else 0.0
        by_time = (time.monotonic() - started) / settings.seconds if settings.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def build(example: _Example) -> tuple[bl.ControlProblem, Tensor]:
        scan = network.prepare(fft2c(example.target)[None], example.mask)
        rows, target, reference = example.rows, example.target, example.reference
        if rows != slice(0, target.shape[-2]):
            scan = scan.crop_rows(rows.start, rows.stop - rows.start)
        return network.training_problem(
            scan, target[None, :, rows], reference[None, rows], settings.loss
        )

    def advance(progress: bl.Progress) -> bool:
        nonlocal done
        done = progress.step
        spent = share()
        rate = settings.learning_rate * min(1.0, (done + 1) / max(settings.warmup, 1))
        for group in progress.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * spent))
        if after_step is not None:
            after_step(TrainingState(done, spent, progress.cost, progress.control))
        return spent >= 1.0

    first_rate = settings.learning_rate / max(settings.warmup, 1)
    solver = bl.ControlSolver(
        build,
        lambda leaves: torch.optim.Adam(leaves, first_rate, betas=(0.9, 0.99)),
        settings.checkpointing,
    )
    found = solver.solve(
        control,
        steps=settings.steps or 10**9,
        batches=_examples(slices, settings, share),
        callback=advance,
    )
    return TrainingResult(found.control, found.costs, time.monotonic() - started)


def _examples(
    slices: SliceDataset, settings: TrainingSettings, share: Callable[[], float]
) -> Iterator[_Example]:
    generator = torch.Generator().manual_seed(settings.seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    while True:
        for index in torch.randperm(len(slices), generator=generator).tolist():
            images, reference = _images(slices[index])
            for axis in (-2, -1):
                if draw(2):
                    images, reference = images.flip(axis), reference.flip(axis)
            n_rows = images.shape[-2]
            sampling = settings.samplings[draw(len(settings.samplings))]
            mask = sampling.mask((n_rows, images.shape[-1]), generator)
            rows = slice(0, n_rows)
            may_crop = samples_columns(mask) and share() < 1 - settings.whole
            if 0 < settings.crop < n_rows and may_crop:
                top = draw(n_rows - settings.crop + 1)
                rows = slice(top, top + settings.crop)
            yield _Example(images, reference, mask, rows)


def _images(one: Slice) -> tuple[Tensor, Tensor]:
    """Coil images and their root sum of squares; the stored one, where it was not cropped."""
    kspace, reference = fully_sampled(one)
    images = ifft2c(kspace)
    return images, reference if reference.shape == images.shape[-2:] else rss(images)
