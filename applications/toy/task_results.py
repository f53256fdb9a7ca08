"""Settings and results of the experiment on task weights."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from applications.records import spread
from applications.settings import Method, check_counts, check_positive, setting
from applications.toy.tasks import TaskSettings


@dataclass(frozen=True)
class Settings:
    """The experiment.

    Attributes:
        tasks: how many, and how large.
        data: folder of IDX files; None for scikit-learn's digits.
        seeds: runs, each with tasks of its own.
        seed: of the first run.
        method: how hypergradients are found.
        updates: of the weights, by Adam.
        learning_rate: of Adam.
        inner_steps: of the model an update, from where the last ones ended.
        entropy: of `TaskWeights`.
        decay: times half the squared weights of the model is added to every training loss.
        fit_steps: of every final model, from zero, whatever it is trained on.
        adapt_steps: from the model of the learned vector towards each training task.
    """

    tasks: TaskSettings = field(default_factory=TaskSettings)
    data: Path | None = setting(None, "Folder of IDX files; without it, scikit-learn's digits.")
    seeds: int = setting(3, "Runs, each with a seed of its own.", least=1)
    seed: int = setting(0, "Of everything that is random.")
    method: Method = setting(Method.IMPLICIT, "Of hypergradients.")
    updates: int = setting(25, "Of the weights.", least=1)
    learning_rate: float = 0.3
    inner_steps: int = setting(20, "Of the model an update.", least=1)
    entropy: float = setting(0.05, "Reward of even weights, against collapse to one task.", least=0)
    decay: float = 0.01
    fit_steps: int = setting(300, "Of each model compared.", least=1)
    adapt_steps: int = 100

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, "seeds", "updates", "inner_steps", "fit_steps", "adapt_steps")
        check_positive(self, "learning_rate", "decay")


@dataclass(frozen=True, eq=False)
class Learned:
    """Weights found by bilevel descent.

    Attributes:
        sigma: shape ``(N,)`` or ``(N, M)``, columns of sum 1.
        related_mass: share of each column on related tasks; one number for a vector.
        values: the outer objective before each update.
        error_estimate: of the hypergradient at these weights after `fit_steps`, by its
            certificate, relative: large where little is left to descend.
        seconds: that the descent took.
    """

    sigma: Tensor
    related_mass: Tensor
    values: list[float]
    error_estimate: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Run:
    """One seed.

    Attributes:
        seed: of the tasks.
        vector: weights of one model for all validation tasks.
        matrix: weights of one model a validation task.
        accuracies: on test data, shape ``(M,)``, by way of training.
    """

    seed: int
    vector: Learned
    matrix: Learned
    accuracies: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Result:
    """All seeds.

    Attributes:
        settings: of the experiment.
        data: name of the data set.
        tasks: names of the training tasks.
        validations: names of the validation tasks.
        related: whether training task i is of the kind of validation task j, shape ``(N, M)``.
        runs: one a seed.
    """

    settings: Settings
    data: str
    tasks: tuple[str, ...]
    validations: tuple[str, ...]
    related: Tensor
    runs: tuple[Run, ...]

    def accuracy(self, way: str) -> Tensor:
        """Test accuracy of each seed, in the mean over validation tasks, shape ``(seeds,)``."""
        return torch.stack([run.accuracies[way].mean() for run in self.runs])

    def as_json(self) -> dict:
        """Everything, in plain values."""
        settings = asdict(self.settings)
        settings["data"] = None if self.settings.data is None else str(self.settings.data)
        summary = {
            way: {"mean": float(found.mean()), "spread": spread(found)}
            for way, found in ((way, self.accuracy(way)) for way in self.runs[0].accuracies)
        }
        return {
            "settings": settings,
            "data": self.data,
            "tasks": self.tasks,
            "validations": self.validations,
            "related": self.related.int().tolist(),
            "accuracy": summary,
            "runs": [
                {
                    "seed": run.seed,
                    "vector": _plain(run.vector),
                    "matrix": _plain(run.matrix),
                    "accuracies": {way: x.tolist() for way, x in run.accuracies.items()},
                }
                for run in self.runs
            ],
        }


def _plain(learned: Learned) -> dict:
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in vars(learned).items()
    }
