"""What was measured of transfer between tasks: settings, scores, and how they agree."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from applications.errors import InputError
from applications.mri.evaluation.metrics import Scores, mean_scores
from applications.mri.meta.results import Table
from applications.mri.meta.settings import MetaSettings
from applications.records import describe
from applications.settings import Written, only, setting


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--steps must be whole numbers, as 0,1,5,20, got {text!r}.") from None


@dataclass(frozen=True)
class TransferSettings:
    """What is measured.

    Attributes:
        training: of a model on one task alone, and of the steps that adapt.
        steps: of adaptation; 0 is the model as it is.
        slices: of a task that models are adapted on.

    Raises:
        InputError: if there is no number of steps, or a number is negative.
    """

    training: MetaSettings = only(
        *("seconds", "evaluations", "optimizer", "learning_rate", "batch", "crop"),
        *("checkpointing", "seed", "device"),
    )
    steps: tuple[int, ...] = setting(
        (0, 1, 5, 20), "Of adaptation.", written=Written(str, "0,1,5,20", _numbers)
    )
    slices: int = setting(2, "That models adapt on.", least=1)

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.steps or min(self.steps) < 0 or self.slices < 1:
            raise InputError(
                "steps must be one or more numbers >= 0 and slices at least 1, got "
                f"{','.join(map(str, self.steps)) or 'none'} and {self.slices}."
            )


@dataclass(frozen=True, eq=False)
class Transfer:
    """What was measured.

    Attributes:
        settings: of it.
        trained: names of the tasks that models were trained on alone.
        seen: names of the tasks of the list that have test slices.
        unseen: names of those that no model was trained or validated on.
        scores: of every model on every task; models trained alone have the name of their task.
        curves: of every model on every task that has slices to adapt on, by steps.
        learned: correlation by training task and validation task, None where none was given.
    """

    settings: TransferSettings
    trained: tuple[str, ...]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    scores: Table
    curves: dict[str, dict[str, dict[int, Scores]]]
    learned: dict[str, dict[str, float]] | None

    @property
    def models(self) -> tuple[str, ...]:
        """Those trained alone, then those given."""
        return tuple(self.scores)

    def gain(self, model: str, task: str) -> float:
        """PSNR [dB] above the mean over the models trained alone on one task, on this task."""
        mean = fmean(self.scores[one][task].psnr for one in self.trained)
        return self.scores[model][task].psnr - mean

    def curve(self, model: str, tasks: Sequence[str]) -> list[float]:
        """Mean PSNR [dB] over tasks, by steps."""
        return [
            mean_scores(self.curves[model][task][k] for task in tasks).psnr
            for k in self.settings.steps
        ]

    def agreement(self) -> dict[str, float]:
        """Rank correlation of learned weights and measured PSNR over training tasks.

        Returns:
            By validation task with test slices; without those whose weights or scores are equal.
        """
        from scipy.stats import spearmanr  # slow to import

        found: dict[str, float] = {}
        for task in self.seen if self.learned else ():
            pairs = [
                (row[task], self.scores[name][task].psnr)
                for name, row in (self.learned or {}).items()
                if task in row and name in self.trained
            ]
            sigma, psnr = zip(*pairs, strict=True) if pairs else ((), ())
            if len(set(sigma)) > 1 and len(set(psnr)) > 1:
                result: Any = spearmanr(sigma, psnr)
                found[task] = float(result.statistic)
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "settings": describe(self.settings.training)
            | {"steps": self.settings.steps, "slices": self.settings.slices},
            "train": self.trained,
            "seen": self.seen,
            "unseen": self.unseen,
            "scores": {
                model: {task: asdict(one) for task, one in row.items()}
                for model, row in self.scores.items()
            },
            "curves": {
                model: {
                    task: {str(k): asdict(one) for k, one in curve.items()}
                    for task, curve in row.items()
                }
                for model, row in self.curves.items()
            },
            "learned": self.learned,
            "rank_correlation": self.agreement(),
        }
