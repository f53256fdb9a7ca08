"""How a network is trained: every choice, checked when it is made."""

from dataclasses import dataclass, field

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.reconstruction import Loss
from applications.mri.sampling import CartesianRandom, Sampling
from applications.mri.training.precision import Precision, check_device
from applications.mri.training.schedules import SCHEDULES, Cosine, Schedule
from applications.mri.training.self_supervised import SelfSupervision
from applications.mri.training.validation import Validation
from applications.settings import (
    MOST_RATE,
    Written,
    check_counts,
    check_positive,
    chosen_by_name,
    setting,
)


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        samplings: one of them, drawn at random, undersamples each slice; repeat one to favour it.
        steps: updates at most; None: as many as `seconds` allow.
        seconds: time at most [s]; None: as long as `steps` take.
        learning_rate: of Adam at its peak; it rises over `warmup` updates.
        schedule: how it falls with the share of steps or time that is spent.
        warmup: updates.
        accumulate: slices an update, which goes by the mean of their losses; one is swept at a
            time, whatever their sizes.
        crop: image rows of a training crop [pixels]; 0 trains on whole slices. Masks that sample
            whole columns alias along columns only, so that a crop of rows is a smaller scan of the
            same kind, at a fraction of the time; slices with other masks are trained on whole.
        whole: last share of the training, in [0, 1], that sees whole slices.
        loss: weights of the terms.
        self_supervision: how the samples of scans without reference are split; None trains with
            the reference. It takes slices as they were measured: whole, not flipped, with the mask
            of the file instead of `samplings`.
        validation: how often validation slices are looked at, if there are any.
        checkpointing: of the sweeps; a `bilevel.Budget` is planned once a slice shape.
        device: where to train, as torch names it: `"cpu"`, `"cuda"`, `"cuda:1"`.
        precision: of the convolutions; bfloat16 needs a GPU.
        seed: of slices, crops, flips, masks and splits.

    Raises:
        InputError: if neither steps nor seconds limit the training, or a setting is out of range.
    """

    samplings: tuple[Sampling, ...] = (CartesianRandom(4.0, 0.08),)
    steps: int | None = setting(None, "Updates at most.", least=1)
    seconds: float | None = setting(None, "Seconds at most.", least=1)
    learning_rate: float = setting(3e-3, "Of Adam at its peak.")
    schedule: Schedule = setting(
        Cosine,
        f"Of the learning rate: {', '.join(SCHEDULES)}.",
        written=chosen_by_name("schedule", SCHEDULES, "cosine"),
    )
    warmup: int = 20
    accumulate: int = setting(1, "Slices an update.", least=1)
    crop: int = setting(32, "Rows of a training crop, 0: none.", least=0)
    whole: float = setting(0.2, "Last share of the training that sees whole slices.")
    loss: Loss = setting(
        Loss,
        "Weights of its terms: of coil images, image and start, such as 1,1,0.01.",
        written=Written(str, None, Loss.written),
    )
    self_supervision: SelfSupervision | None = None
    validation: Validation = field(default_factory=Validation)
    checkpointing: bl.Checkpointing | bl.Budget = setting(
        bl.Checkpointing,
        "Memory of a sweep, such as '500 MiB'.",
        name="budget",
        written=Written(str, None, bl.Budget),
    )
    device: str = setting("cpu", "Where to train, cpu or cuda.")
    precision: Precision = setting(Precision.FLOAT32, "Of the convolutions; bfloat16 needs a GPU.")
    seed: int = setting(0, "Of everything that is random.")

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
        check_positive(self, "learning_rate", most=MOST_RATE)
        check_counts(self, "accumulate")
        if self.crop < 0 or self.warmup < 0 or not 0 <= self.whole <= 1:
            raise InputError(
                f"crop and warmup must be >= 0 and whole in [0, 1], got {self.crop}, "
                f"{self.warmup} and {self.whole}."
            )
        check_device(self.device, self.precision)

    def rate(self, done: int, share: float) -> float:
        """The learning rate of the next update.

        Args:
            done: updates.
            share: of the training that is spent, in [0, 1].

        Returns:
            The rate.
        """
        rising = min(1.0, (done + 1) / max(self.warmup, 1))
        return self.learning_rate * rising * self.schedule.factor(share)
