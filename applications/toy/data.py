"""Data sets of labelled images, and what spoils them: wrong labels, turned images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.toy.idx import read_idx

_IMAGES, _LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled square images.

    Attributes:
        inputs: pixels in [0, 1], shape ``(n, d)``, float32.
        labels: classes 0, ..., n_classes - 1, shape ``(n,)``, int64.
        n_classes: their number.
        side: rows and columns of an image; d is its square.
        name: for reports.
    """

    inputs: Tensor
    labels: Tensor
    n_classes: int
    side: int
    name: str

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> "Dataset":
        """The chosen samples."""
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen])

    def to(self, device: torch.device | str) -> "Dataset":
        """The same on another device."""
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device))


def load(folder: Path | None = None, part: str | None = None) -> Dataset:
    """The samples of a folder of IDX files, or scikit-learn's digits.

    Files belong together as `<part>-images-idx3-ubyte` and `<part>-labels-idx1-ubyte`, each plain
    or with the ending `.gz`; MNIST has the parts `train` and `t10k`.

    Args:
        folder: of MNIST or a data set in its layout; None for the 1797 digits of 8 x 8 pixels that
            come with scikit-learn.
        part: the only one to read; None puts all together, `train` before the others.

    Returns:
        The data set.

    Raises:
        InputError: if the folder has no such files, or they do not fit each other.
    """
    if folder is not None:
        return _from_idx(folder, part)
    if part is not None:
        raise InputError(f"a folder was needed to read the part {part!r} from; name one.")
    return _digits()


def load_apart(folder: Path | None = None) -> tuple[Dataset, Dataset | None]:
    """The samples to learn from, and those that a folder sets aside for tests.

    Args:
        folder: as for `load`.

    Returns:
        The parts `train` and `t10k`; all samples and None where there are no such parts.
    """
    if folder is not None and {"train", "t10k"} <= _find(folder).keys():
        return load(folder, "train"), load(folder, "t10k")
    return load(folder), None


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # slow to import

    found: Any = load_digits()
    inputs = torch.as_tensor(np.asarray(found["data"], np.float32) / 16)
    labels = torch.as_tensor(np.asarray(found["target"], np.int64))
    return Dataset(inputs, labels, 10, 8, "digits")


def _from_idx(folder: Path, part: str | None) -> Dataset:
    found = _find(folder)
    names = sorted(found, key=lambda name: (name != "train", name))
    if part is not None:
        if part not in found:
            raise InputError(
                f"{folder}: part {part!r} was needed, the folder has {', '.join(names)}; take one."
            )
        names = [part]
    pairs = [_read_pair(*found[name]) for name in names]
    shapes = {images.shape[1:] for images, _ in pairs}
    if len(shapes) > 1:
        raise InputError(
            f"{folder}: images of one size were needed, got {sorted(shapes)}; keep one data set in "
            "a folder."
        )
    images = np.concatenate([images for images, _ in pairs])
    labels = torch.as_tensor(np.concatenate([labels for _, labels in pairs]).astype(np.int64))
    inputs = torch.as_tensor(images.reshape(len(images), -1).astype(np.float32) / 255)
    return Dataset(inputs, labels, int(labels.max()) + 1, images.shape[1], folder.resolve().name)


def _find(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Pairs of files, images and labels, by what their names begin with."""
    if not folder.is_dir():
        raise InputError(f"{folder}: a folder of IDX files was needed; this is none. Check it.")
    found: dict[str, tuple[Path, Path]] = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(".gz")
        if not stem.endswith(_IMAGES):
            continue
        name = stem.removesuffix(_IMAGES)
        ways = [folder / f"{name}{_LABELS}{ending}" for ending in ("", ".gz")]
        labels = next((way for way in ways if way.exists()), None)
        if labels is None:
            raise InputError(
                f"{path}: its labels were needed, {name}{_LABELS} or the same with .gz; the folder "
                "has neither. Copy them beside it."
            )
        found.setdefault(name, (path, labels))
    if not found:
        raise InputError(
            f"{folder}: files such as train{_IMAGES} or train{_IMAGES}.gz were needed, the folder "
            "has none; check the path."
        )
    return found


def _read_pair(images_at: Path, labels_at: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_at, 3), read_idx(labels_at, 1)
    if len(images) != len(labels) or not len(labels):
        raise InputError(
            f"{labels_at}: one label an image was needed, got {len(labels)} for {len(images)}; "
            "copy or download both again."
        )
    if images.shape[1] != images.shape[2]:
        raise InputError(
            f"{images_at}: square images were needed, got {images.shape[1]} x {images.shape[2]}; "
            "pad them."
        )
    return images, labels


def split(data: Dataset, sizes: Sequence[int], generator: torch.Generator) -> tuple[Dataset, ...]:
    """Disjoint random parts.

    Args:
        data: what to split.
        sizes: of the parts, each at least 1.
        generator: of the order.

    Returns:
        One data set a size.

    Raises:
        InputError: if a size is below 1, or all together are more than there is.
    """
    if not sizes or min(sizes) < 1:
        raise InputError(f"sizes must be at least 1 each, got {list(sizes)}.")
    if sum(sizes) > len(data):
        raise InputError(
            f"{data.name}: {' + '.join(map(str, sizes))} = {sum(sizes)} samples were needed, there "
            f"are {len(data)}; ask for fewer."
        )
    order = torch.randperm(len(data), generator=generator)[: sum(sizes)]
    return tuple(data[part] for part in order.split(list(sizes)))


class Convention(StrEnum):
    """What a share of corrupted labels means; papers use both."""

    UNIFORM = "uniform"  # that share is drawn anew from all classes: some are right by chance
    EXACT = "exact"  # that share is wrong


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A data set with wrong labels.

    Attributes:
        data: with them.
        wrong: which differ from the true ones, shape ``(n,)``, bool.
    """

    data: Dataset
    wrong: Tensor


def corrupt(
    data: Dataset, share: float, convention: Convention, generator: torch.Generator
) -> Corrupted:
    """Wrong labels on randomly chosen samples.

    By `uniform`, a nominal half of the labels of ten classes leaves 45 % wrong in the mean.

    Args:
        data: with true labels.
        share: of the samples, in [0, 1]; rounded to whole samples.
        convention: what becomes of them.
        generator: of the choice and the new labels.

    Returns:
        The data with the new labels, and where they are wrong.

    Raises:
        InputError: if the share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must lie in 0 to 1, got {share}.")
    chosen = torch.randperm(len(data), generator=generator)[: round(share * len(data))]
    lowest = 1 if convention == Convention.EXACT else 0
    shift = torch.randint(lowest, data.n_classes, chosen.shape, generator=generator)
    labels = data.labels.clone()
    labels[chosen] = (labels[chosen] + shift) % data.n_classes
    return Corrupted(replace(data, labels=labels), labels != data.labels)


def rotate(data: Dataset, turns: int) -> Dataset:
    """The images turned counter-clockwise.

    Args:
        data: what to turn.
        turns: by 90 degrees each; any whole number.

    Returns:
        The data with turned images, labels as they were.
    """
    images = data.inputs.reshape(-1, data.side, data.side)
    return replace(data, inputs=images.rot90(turns, (1, 2)).reshape(data.inputs.shape))


def permute_labels(data: Dataset, generator: torch.Generator) -> Dataset:
    """Every class takes the name of another, so that all labels are wrong, consistently.

    Args:
        data: with true labels.
        generator: of the permutation, which is one cycle through all classes.

    Returns:
        The data with permuted labels.
    """
    order = torch.randperm(data.n_classes, generator=generator)
    new = torch.empty_like(order)
    new[order] = order.roll(1)
    return replace(data, labels=new[data.labels])
