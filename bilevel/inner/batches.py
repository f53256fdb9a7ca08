"""Minibatches that a sweep can ask for again: a function of the seed and the step alone."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_whole
from bilevel.errors import ArgumentError, StructureError
from bilevel.settings import Stepwise


@final
@dataclass(frozen=True, eq=False)
class Minibatches(Stepwise):
    """Batches of a data set, shuffled anew each epoch, the same whenever a step is asked for.

    Step t = 1, 2, ... gets batch (t - 1) mod n of epoch (t - 1) div n, n being `len`. The order of
    an epoch is drawn by a generator of its own, seeded by the seed and the number of the epoch. So
    a sweep that goes backwards finds the batches of its way forwards, which those of a
    `DataLoader`, drawn as it is read, are not. As an `inner_batch` each step gets one, as `batches`
    of a `solve` each update.

    Attributes:
        dataset: a tensor, a tuple or dict of tensors with one first axis, or a map-style
            `torch.utils.data.Dataset`.
        size: samples a batch; the last batch of an epoch has what is left.
        seed: of the shuffling.
        collate: makes a batch of a list of samples of a `Dataset`; None is torch's
            `default_collate`.
        drop_last: leave out the last batch of an epoch where it is smaller.

    Raises:
        ArgumentError: if the dataset is a `DataLoader`, has no length or no samples, or a setting
            is out of range.
        StructureError: if its tensors differ in their first axis.

    Example:
        >>> batches = Minibatches((torch.arange(5), torch.arange(5) ** 2), size=2, seed=0)
        >>> len(batches), [x.tolist() for x, _ in batches]
        (3, [[4, 3], [2, 1], [0]])
        >>> torch.equal(batches.at(4)[0], batches.at(4)[0])
        True
    """

    dataset: Any
    size: int
    seed: int = 0
    collate: Callable[[list[Any]], Any] | None = None
    drop_last: bool = False
    _n: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_n", _length(self.dataset))
        check_whole(self.size, "size", 1)
        if self.size > self._n:
            raise ArgumentError(
                f"size must be at most the number of samples, {self._n}, got {self.size}; pass the "
                "data themselves as the batch for all of them at each step."
            )
        check_whole(self.seed, "seed", 0)
        if self.collate is not None and _is_tensors(self.dataset):
            raise ArgumentError(
                "collate makes batches of the samples of a Dataset; tensors are indexed, leave it "
                "out."
            )

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._n // self.size if self.drop_last else math.ceil(self._n / self.size)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the first epoch; a `solve` goes on with the next ones."""
        return (self.at(t) for t in range(1, len(self) + 1))

    def at(self, t: int) -> Any:  # noqa: D102
        epoch, k = divmod(t - 1, len(self))
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        order = torch.randperm(self._n, generator=generator, device="cpu")
        chosen = order[k * self.size : (k + 1) * self.size]
        return self._batch(chosen, _mixed(self.seed, t, 1))

    @property
    def whole(self) -> Any:
        """All samples in one batch, in their order, as for a `linear_batch`."""
        return self._batch(torch.arange(self._n, device="cpu"), _mixed(self.seed, 0, 2))

    def _batch(self, chosen: Tensor, seed: int) -> Any:
        if _is_tensors(self.dataset):
            return tree.map_leaves(lambda x: x[chosen.to(x.device)], self.dataset)
        from torch.utils.data import default_collate

        # What a sample draws as it is read, an augmentation say, is of the seed and the step too.
        with _seeded(seed):
            samples = [self.dataset[i] for i in chosen.tolist()]
        return (self.collate or default_collate)(samples)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is drawn inside is of the seed; the random states are those from before afterwards.

    `torch.manual_seed` notes down the whole stack for each kind of device that the machine has not,
    which takes longer than to read a small batch.
    """
    known = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with torch.random.fork_rng(range(known), device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


def _is_tensors(dataset: Any) -> bool:
    """Whether it is a tree of tensors, not a data set that has samples."""
    return isinstance(dataset, Tensor | tuple | dict)


def _length(dataset: Any) -> int:
    """The number of samples."""
    if _is_tensors(dataset):
        leaves = tree.leaves_of(dataset)
        if not leaves or not all(isinstance(x, Tensor) and x.ndim for x in leaves):
            kinds = ", ".join(sorted({tree.kind(x) for x in leaves})) or "nothing"
            raise ArgumentError(
                "dataset as a tuple or dict must hold tensors with a first axis of samples, got "
                f"{kinds}; torch.as_tensor makes tensors of arrays; for samples of any kind pass "
                "a Dataset."
            )
        sizes = {len(x) for x in leaves}
        if len(sizes) > 1:
            raise StructureError(
                "the tensors of a dataset must have the same number of samples, got "
                f"{' and '.join(map(str, sorted(sizes)))}."
            )
        n = sizes.pop()
    else:
        n = _length_of_samples(dataset)
    if not n:
        raise ArgumentError("the dataset has no samples; minibatches need at least one.")
    return n


def _length_of_samples(dataset: Any) -> int:
    refuse_loader(dataset, "dataset")
    if isinstance(dataset, list):
        raise ArgumentError(
            "a list may hold tensors or samples: pass a tuple of tensors (inputs, targets), or a "
            "Dataset of samples."
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ArgumentError(
            "dataset must be tensors or a map-style Dataset, with __getitem__ and __len__, got "
            f"{type(dataset).__name__}; what can be read once only has no batch for a given step."
        )
    return len(dataset)


def refuse_loader(batch: Any, name: str) -> None:
    """Refuse a `DataLoader` where batches must be the same whenever they are asked for.

    Args:
        batch: what was given.
        name: of the argument.

    Raises:
        ArgumentError: if it is one.
    """
    # What was not imported is no loader of the caller's.
    data = sys.modules.get("torch.utils.data")
    if data is not None and isinstance(batch, data.DataLoader):
        raise ArgumentError(
            f"{name} is a DataLoader, which shuffles anew whenever it is read, so that a sweep "
            "backwards would find other batches than the one forwards; pass "
            "Minibatches(loader.dataset, loader.batch_size, seed, collate=loader.collate_fn)."
        )


def refuse_many(batch: Any, name: str) -> None:
    """Refuse many batches in the place of one.

    Args:
        batch: what was given.
        name: of the argument.

    Raises:
        ArgumentError: if it gives batches.
    """
    data = sys.modules.get("torch.utils.data")
    if isinstance(batch, Stepwise) or (data is not None and isinstance(batch, data.DataLoader)):
        raise ArgumentError(
            f"{name} is one batch, which judges the params at the end, got {type(batch).__name__}: "
            "pass minibatches.whole or next(iter(loader)); a solve that is to judge each update by "
            "the next one takes batches=[(inner_batch, batch) for batch in loader]."
        )


def _mixed(seed: int, *numbers: int) -> int:
    """One seed of several numbers (the multiplier of PCG64, O'Neill 2014)."""
    found = seed
    for number in numbers:
        found = (found * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return found
