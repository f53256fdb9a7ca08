"""Batches of an outer loop, begun again when they end."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from bilevel.errors import ArgumentError
from bilevel.settings import Stepwise


def cycled(batches: Iterable[Any] | Stepwise, name: str = "batches") -> Iterator[Any]:
    """The batches again and again; an error if a round is empty."""
    if isinstance(batches, Stepwise):  # it knows its epochs, each in an order of its own
        yield from map(batches.at, count(1))
        return
    given = 0
    while True:
        empty = True
        for batch in batches:
            empty = False
            given += 1
            yield batch
        if empty and not given:
            raise ArgumentError(
                f"{name} gave nothing: pass a list or a DataLoader with at least one batch; an "
                "iterator can be read only once."
            )
        if empty:
            raise ArgumentError(
                f"{name} gave {given} batches, then ended, since an iterator (zip, map, a "
                "generator) is read only once: pass a list, a DataLoader, or for a bilevel problem "
                "a pair of them, batches=(inner_loader, outer_loader)."
            )


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The batches again and again, so many at a time."""
    stream = cycled(batches)
    while True:
        yield [next(stream) for _ in range(size)]


def paired(batches: Any) -> Iterable[tuple[Any, Any]]:
    """Pairs (inner_batch, outer_batch), from an iterable of them or from a pair of iterables."""
    if not isinstance(batches, tuple) or len(batches) != 2:
        return _Checked(batches)
    if all(isinstance(part, tuple) and len(part) == 2 for part in batches):
        raise ArgumentError(
            "batches is a tuple of two tuples of two, which may be two pairs (inner_batch, "
            "outer_batch) or a pair of two batches each: pass a list of pairs, or a pair of lists."
        )
    for name, part in zip(("inner", "outer"), batches, strict=True):
        if isinstance(part, Tensor | Mapping | str) or not isinstance(part, Iterable | Stepwise):
            raise ArgumentError(
                f"batches as a pair must be two loaders (inner_loader, outer_loader), got "
                f"{type(part).__name__} for the {name} one; a single pair of batches for all "
                "updates is batches=[(inner_batch, outer_batch)]."
            )
    inner, outer = batches
    return zip(cycled(inner, "the inner loader"), cycled(outer, "the outer loader"), strict=False)


class _Checked:
    """An iterable of batches, each a pair."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if not isinstance(batches, Iterable):
            raise ArgumentError(
                "batches must be an iterable of pairs (inner_batch, outer_batch), got "
                f"{type(batches).__name__}."
            )
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self._batches:
            # A list of two is what a DataLoader makes of (x, y): one batch, and no pair of them.
            # So is a named tuple, unless it is unpacked.
            if type(batch) is not tuple or len(batch) != 2:
                came = f"{type(batch).__name__}{f' of {len(batch)}' if _sized(batch) else ''}"
                raise ArgumentError(
                    f"batches must give tuples, pairs (inner_batch, outer_batch), got a {came}; "
                    "pass batches=(inner_loader, outer_loader) for two DataLoaders, which give "
                    "lists (x, y), or zip(inner_batches, outer_batches) for two lists."
                )
            yield batch


def _sized(batch: Any) -> bool:
    return isinstance(batch, list | tuple | dict)
