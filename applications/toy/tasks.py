"""Training tasks of several kinds, of which some belong to a validation task and some do not."""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from applications.settings import check_counts, setting
from applications.toy.data import Convention, Dataset, corrupt, permute_labels, rotate, split


class Kind(StrEnum):
    """What a task is made of."""

    UPRIGHT = "upright"  # images and labels as they are
    TURNED = "turned"  # images turned by 90 degrees, right labels
    MISLABELLED = "mislabelled"  # labels permuted: a rule, but another one
    RANDOM = "random labels"  # no rule at all


VALIDATED = (Kind.UPRIGHT, Kind.TURNED)  # what validation tasks there are


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of several tasks of one size.

    Attributes:
        inputs: shape ``(tasks, n, d)``, float64.
        labels: shape ``(tasks, n)``, int64.
        names: of the tasks.
    """

    inputs: Tensor
    labels: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class TaskSettings:
    """How many tasks, and how large.

    Attributes:
        tasks: training tasks of each of the four kinds.
        validations: validation tasks, upright and turned in turn.
        train: samples of a training task.
        validation: samples of a validation task.
        test: samples on which a validation task's model is judged.
    """

    tasks: int = setting(3, "Training tasks of each of four kinds.", least=1)
    validations: int = setting(4, "Validation tasks, upright and turned in turn.", least=1)
    train: int = setting(40, "Samples of a training task.", least=1)
    validation: int = setting(20, "Samples of a validation task.", least=1)
    test: int = setting(200, "Test samples of a validation task.", least=1)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, "tasks", "validations", "train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Tasks:
    """N training tasks and M validation tasks, no sample in two of them.

    Attributes:
        train: of N tasks.
        validation: of M tasks, little data.
        test: of the same M tasks; nothing but accuracies is taken from it.
        related: whether training task i is of the kind of validation task j, shape ``(N, M)``.
        n_classes: of all tasks.
    """

    train: Samples
    validation: Samples
    test: Samples
    related: Tensor
    n_classes: int


def make_tasks(data: Dataset, settings: TaskSettings, generator: torch.Generator) -> Tasks:
    """Tasks drawn from one data set.

    Mislabelled and random tasks have upright and turned images in turn, so that images alone do not
    give them away.

    Args:
        data: with true labels.
        settings: how many tasks, and how large.
        generator: of everything that is drawn.

    Returns:
        The tasks.

    Raises:
        InputError: if the data are too few.
    """
    kinds = [kind for kind in Kind for _ in range(settings.tasks)]
    judges = [VALIDATED[j % len(VALIDATED)] for j in range(settings.validations)]
    n, m = len(kinds), len(judges)
    parts = split(
        data, [settings.train] * n + [settings.validation] * m + [settings.test] * m, generator
    )
    train = [
        _spoilt(part, kind, i, generator)
        for i, (part, kind) in enumerate(zip(parts[:n], kinds, strict=True))
    ]
    validation, test = (
        [
            _spoilt(part, kind, j, generator)
            for j, (part, kind) in enumerate(zip(some, judges, strict=True))
        ]
        for some in (parts[n : n + m], parts[n + m :])
    )
    related = torch.tensor([[kind == judge for judge in judges] for kind in kinds])
    return Tasks(
        _stacked(train, kinds),
        _stacked(validation, judges),
        _stacked(test, judges),
        related,
        data.n_classes,
    )


def _spoilt(data: Dataset, kind: Kind, index: int, generator: torch.Generator) -> Dataset:
    """The samples as a task of that kind sees them."""
    if kind in VALIDATED:
        return rotate(data, VALIDATED.index(kind))
    turned = rotate(data, index % 2)
    if kind == Kind.MISLABELLED:
        return permute_labels(turned, generator)
    drawn = corrupt(turned, 1.0, Convention.UNIFORM, generator)
    return replace(turned, labels=drawn.data.labels)


def _stacked(parts: list[Dataset], kinds: list[Kind]) -> Samples:
    count = dict.fromkeys(kinds, 0)
    names = []
    for kind in kinds:
        count[kind] += 1
        names.append(f"{kind} {count[kind]}")
    return Samples(
        torch.stack([part.inputs for part in parts]).double(),
        torch.stack([part.labels for part in parts]),
        tuple(names),
    )
