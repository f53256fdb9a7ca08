"""The part of a batch that is a process's own: some of its samples."""

from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError

ADVICE = (
    "take a batch size that the number of processes divides (drop_last=True leaves out a last "
    "batch that is smaller)"
)


def has_samples(batch: Any) -> bool:
    """Whether a batch has a tensor with a first axis."""
    return any(isinstance(x, Tensor) and x.ndim for x in tree.leaves_of(batch))


def part_of(batch: Any, name: str, rank: int, size: int, among: str = "processes") -> Any:
    """Samples rank n/K, ..., (rank + 1) n/K - 1 of a batch of n.

    Args:
        batch: a tree whose tensors have the samples along their first axis; tensors without axes,
            and what is no tensor, are handed on.
        name: of the batch.
        rank: of this process.
        size: number of processes, K.
        among: what shares the batch.

    Returns:
        The part; its tensors are views.

    Raises:
        ArgumentError: if the tensors differ in their number of samples, or K does not divide it.
    """
    leaves = tree.leaves_of(batch)
    lengths = {
        label: len(x)
        for label, x in zip(tree.leaf_names(batch, name), leaves, strict=True)
        if isinstance(x, Tensor) and x.ndim
    }
    if len({*lengths.values()}) > 1:
        listed = ", ".join(f"{label} {n}" for label, n in [*lengths.items()][:5])
        raise ArgumentError(
            f"a batch is split over {among} along the first axis of its tensors, which must "
            f"have one length, got {listed}: let the objective close over what is no sample, or "
            "give each process its own part and Replicas(split=False)."
        )
    for label, n in lengths.items():
        if n % size:
            raise ArgumentError(
                f"{label} has {n} samples, which {size} {among} cannot share evenly: take a batch "
                f"size that {size} divides (drop_last=True leaves out a smaller last batch)."
            )
    if not lengths:
        return batch
    n = next(iter(lengths.values())) // size
    return tree.map_leaves(
        lambda x: x[rank * n : (rank + 1) * n] if isinstance(x, Tensor) and x.ndim else x, batch
    )


def parts_alike(each: list[dict[str, str]]) -> bool:
    """Whether batches of the processes differ in nothing but their number of samples."""
    return len({tuple((label, _beyond(kind)) for label, kind in one.items()) for one in each}) == 1


def _beyond(kind: str) -> str:
    """What `tree.kind` says, but for the first axis."""
    before, bracket, shape = kind.partition("[")
    first, comma, rest = shape.partition(",")
    return before + bracket + (comma + rest if comma else first.partition("]")[2])
