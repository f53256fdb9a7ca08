"""Settings and results of data hyper-cleaning."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from applications.errors import InputError
from applications.records import spread
from applications.settings import Method, check_counts, check_positive, setting
from applications.toy.data import Convention
from applications.toy.models import Model

CLEANED = "learned weights"  # the way of training that cleaning is for


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples; None: 5000, 5000, 10000 of a folder, and 600, 400, 797 of the digits.

    Attributes:
        train: with labels that are corrupted.
        validation: with true labels.
        test: that accuracies are of.
    """

    train: int | None = setting(None, "Training samples; 5000, digits 600.")
    validation: int | None = setting(None, "Validation samples; 5000, digits 400.")
    test: int | None = setting(None, "Test samples; 10000, digits 797.")


@dataclass(frozen=True)
class CleaningSettings:
    """The experiment.

    Attributes:
        data: folder of IDX files; None for scikit-learn's digits.
        model: what is trained.
        sizes: samples for training, validation and test. Test samples are of the part that a folder
            sets aside for tests, `t10k`, where it has one.
        share: of training labels that are corrupted.
        convention: how.
        seeds: runs, each with a split, labels and start of its own.
        seed: of the first run.
        method: how hypergradients are found.
        updates: of the weights, at most.
        every: updates between two looks at held-out data.
        rate: step of alpha, in units of the number of training samples.
        inner_steps: of the model an update, from where the last ones ended.
        folds: of the validation samples that are the outer objective; each is the outer objective
            of a model that is trained on the others too.
        learning_decay: weight decay of the model while weights are learned. Large: the smaller it
            is, the better alpha can fit the outer objective without finding wrong labels.
        krylov_steps: of conjugate gradients a hypergradient, from where the last ones ended.
        damping: added to the Hessian there, which may be indefinite where a network is not at a
            minimum.
        decays: of the models compared, to choose from; they are tried from the largest on, until
            one is worse on held-out data than the one before.
        hidden: units of the network.
        fit_steps: of L-BFGS, at most.
    """

    data: Path | None = setting(None, "Folder of IDX files; without it, scikit-learn's digits.")
    model: Model = setting(Model.LINEAR, "What is trained.")
    sizes: Sizes = field(default_factory=Sizes)
    share: float = setting(0.5, "Of training labels that are corrupted.")
    convention: Convention = setting(
        Convention.UNIFORM,
        "uniform: drawn anew from all classes, some right; exact: all wrong.",
    )
    seeds: int = setting(1, "Runs, each with a seed of its own.", least=1)
    seed: int = setting(0, "Of everything that is random.")
    method: Method = setting(Method.IMPLICIT, "Of hypergradients.")
    updates: int = setting(24, "Of the weights, at most.", least=1)
    every: int = 8
    rate: float = 0.2
    inner_steps: int = setting(10, "Of the model an update.", least=1)
    folds: int = 2
    learning_decay: float = setting(
        0.01, "Weight decay while weights are learned.", name="decay", least=0
    )
    krylov_steps: int = 10
    damping: float = 0.03
    decays: tuple[float, ...] = (5e-3, 1e-3, 3e-4)
    hidden: int = setting(300, "mlp: hidden units.", least=1)
    fit_steps: int = 100

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, "seeds", "updates", "every", "inner_steps", "krylov_steps")
        check_counts(self, "hidden", "fit_steps")
        check_positive(self, "rate", "learning_decay")
        if self.folds < 2:
            raise InputError(f"folds must be at least 2, got {self.folds}.")
        if not self.damping >= 0:
            raise InputError(f"damping must be >= 0, got {self.damping}.")
        if not self.decays or min(self.decays) <= 0:
            raise InputError(f"decays must be one or more numbers > 0, got {self.decays}.")

    @property
    def parts(self) -> tuple[int, int, int]:
        """Samples for training, validation and test."""
        asked = self.sizes
        train, validation, test = (600, 400, 797) if self.data is None else (5000, 5000, 10000)
        return (
            train if asked.train is None else asked.train,
            validation if asked.validation is None else asked.validation,
            test if asked.test is None else asked.test,
        )


@dataclass(frozen=True)
class Cleaning:
    """Weights of samples against the truth.

    Attributes:
        f1: harmonic mean of precision and recall of "weight below one half" as the verdict that a
            label is wrong; 1 is perfect.
        precision: share of wrong labels among those so judged.
        recall: share so judged of the wrong labels.
        wrong_mass: share of the total weight that lies on wrong labels.
    """

    f1: float
    precision: float
    recall: float
    wrong_mass: float


def judge(weights: Tensor, wrong: Tensor) -> Cleaning:
    """Compares weights with the truth.

    Args:
        weights: of the samples, shape ``(n,)``, in [0, 1].
        wrong: whose labels are wrong, shape ``(n,)``, bool.

    Returns:
        The figures; a ratio of nothing to nothing is 1 where nothing was missed.
    """
    judged = weights < 0.5
    hits, n_judged, n_wrong = (int(x.sum()) for x in (judged & wrong, judged, wrong))
    return Cleaning(
        2 * hits / (n_judged + n_wrong) if n_judged + n_wrong else 1.0,
        hits / n_judged if n_judged else 1.0,
        hits / n_wrong if n_wrong else 1.0,
        float(weights[wrong].sum() / weights.sum()),
    )


@dataclass(frozen=True, eq=False)
class CleaningRun:
    """One seed.

    Attributes:
        seed: of everything random.
        weights: learned, shape ``(n,)``.
        wrong: whose labels are wrong, shape ``(n,)``, bool.
        cleaning: how well the weights tell.
        values: the outer objective before each update.
        updates: that the weights were made by; chosen on held-out data.
        accuracies: on test data, by way of training.
        decays: chosen on held-out data, by way of training.
        steps: of L-BFGS, by way of training.
        held_out: mean cross-entropy on held-out data, before they were trained on, by way.
        seconds: that the descent took, without looks at held-out data.
    """

    seed: int
    weights: Tensor
    wrong: Tensor
    cleaning: Cleaning
    values: list[float]
    updates: int
    accuracies: dict[str, float]
    decays: dict[str, float]
    steps: dict[str, int]
    held_out: dict[str, float]
    seconds: float


@dataclass(frozen=True, eq=False)
class CleaningResult:
    """All seeds.

    Attributes:
        settings: of the experiment.
        data: name of the data set.
        runs: one a seed.
    """

    settings: CleaningSettings
    data: str
    runs: tuple[CleaningRun, ...]

    def accuracy(self, way: str) -> Tensor:
        """Test accuracy of each seed, shape ``(seeds,)``."""
        return torch.tensor([run.accuracies[way] for run in self.runs])

    def cleaning(self, name: str) -> Tensor:
        """A field of `Cleaning` for each seed, shape ``(seeds,)``."""
        return torch.tensor([getattr(run.cleaning, name) for run in self.runs])

    def as_json(self) -> dict:
        """Everything but the weights, in plain values."""
        settings = asdict(self.settings) | {"sizes": self.settings.parts}
        settings["data"] = None if self.settings.data is None else str(self.settings.data)
        found = {way: self.accuracy(way) for way in self.runs[0].accuracies}
        found |= {name: self.cleaning(name) for name in asdict(self.runs[0].cleaning)}
        hidden = {"weights", "wrong", "cleaning"}
        return {
            "settings": settings,
            "data": self.data,
            "summary": {
                name: {"mean": float(x.mean()), "spread": spread(x)} for name, x in found.items()
            },
            "runs": [
                {name: x for name, x in vars(run).items() if name not in hidden}
                | {"wrong_share": float(run.wrong.double().mean())}
                | asdict(run.cleaning)
                for run in self.runs
            ],
        }
