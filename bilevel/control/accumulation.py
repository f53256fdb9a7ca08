"""Several batches an update: the mean of their costs and gradients, swept one after the other."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from bilevel import tree
from bilevel.checks import is_whole
from bilevel.control.lagrangian import Adjoint
from bilevel.errors import ArgumentError
from bilevel.outer.descent import cycled


def check_accumulation(accumulate: Any, *, possible: bool) -> None:
    """Refuse anything but a number of batches, and more than one where there are none.

    Args:
        accumulate: as the user gave it.
        possible: whether problems are built of batches, and a first-order optimiser moves.

    Raises:
        ArgumentError: if it is no count, or not possible.
    """
    if not is_whole(accumulate, 1):
        raise ArgumentError(f"accumulate must be a whole number >= 1, got {accumulate!r}.")
    if accumulate > 1 and not possible:
        raise ArgumentError(
            "accumulate needs a solver that holds build(batch) and a first-order optimiser, got "
            f"accumulate={accumulate} without; leave it at 1."
        )


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The batches again and again, so many at a time.

    Args:
        batches: begun again when they end.
        size: of a group.

    Yields:
        A list of batches; it may reach into the next round.
    """
    stream = cycled(batches)
    while True:
        yield [next(stream) for _ in range(size)]


def mean_of(found: Iterator[Adjoint]) -> Adjoint:
    """The mean of costs and gradients, while one record is held at a time.

    Args:
        found: of one control, at least one.

    Returns:
        The mean; forward steps are the sum, and the rest is that of the last.
    """
    total, n = next(found), 1
    for n, one in enumerate(found, 2):  # noqa: B007
        total = replace(
            one,
            cost=total.cost + one.cost,
            gradient=tree.add(total.gradient, one.gradient),
            forward_steps=total.forward_steps + one.forward_steps,
        )
    gradient = tree.map_leaves(lambda x: None if x is None else x / n, total.gradient)
    return replace(total, cost=total.cost / n, gradient=gradient)
