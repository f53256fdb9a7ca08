"""Batches as one of several processes sees them: whole, and its part."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.errors import ArgumentError
from bilevel.outer.batches import Feed, feed
from bilevel.parallel.parts import part_of
from bilevel.parallel.replicas import Replicas
from bilevel.settings import Stepwise


@dataclass(frozen=True, eq=False)
class Portion:
    """A batch of all processes, and the part of this one."""

    whole: Any
    part: Any


def own(batch: Any) -> Any:
    """What this process evaluates of a batch."""
    return batch.part if isinstance(batch, Portion) else batch


@dataclass(eq=False)
class Portions(Stepwise):
    """The portions of the batches of inner steps.

    Attributes:
        replicas: the processes.
        batches: of all processes, or of this one.
        name: of them.
        splits: whether they are of all processes; None before the first was seen.
    """

    replicas: Replicas
    batches: Stepwise
    name: str
    splits: bool | None = None

    def at(self, t: int) -> Any:  # noqa: D102
        batch = self.batches.at(t)
        if self.splits is None:
            self.splits = self.replicas.splits(batch, self.name)
        return _portion(self.replicas, batch, self.name, splits=self.splits)


def portions(replicas: Replicas, batch: Any, name: str) -> Any:
    """A batch, or the batches of inner steps, with the part of this process.

    Args:
        replicas: the processes.
        batch: a tree, `Stepwise` or None.
        name: of it.

    Returns:
        Itself where it is the part already.
    """
    if isinstance(batch, Stepwise):
        return Portions(replicas, batch, name)
    return _portion(replicas, batch, name, splits=replicas.splits(batch, name))


def _portion(replicas: Replicas, batch: Any, name: str, *, splits: bool) -> Any:
    if not splits:
        return batch
    return Portion(batch, part_of(batch, name, replicas.rank, replicas.size))


class Shares(Feed):
    """Batches of updates, or groups of them, as this process sees them."""

    def __init__(self, replicas: Replicas, batches: Iterable[Any], accumulate: int = 1) -> None:
        """Of one batch an update, or of lists of several."""
        self._replicas, self._feed, self._accumulate = replicas, feed(batches), accumulate

    def __next__(self) -> Any:
        batch = next(self._feed)
        if self._accumulate > 1:
            return self._group(batch)
        return portions(self._replicas, batch, "batch")

    def _group(self, batches: list[Any]) -> list[Any]:
        rank, size = self._replicas.rank, self._replicas.size
        if not self._replicas.splits(batches, "batches", samples=False):
            return batches
        if self._accumulate % size:
            raise ArgumentError(
                f"accumulate={self._accumulate} batches an update cannot be shared evenly by {size}"
                f" processes: take a multiple of {size}."
            )
        n = self._accumulate // size
        return batches[rank * n : (rank + 1) * n]

    def watch(self) -> None:  # noqa: D102
        self._feed.watch()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self._feed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._feed.load_state_dict(state)
