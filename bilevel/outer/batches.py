"""Batches of an outer loop, begun again when they end, and begun at any place."""

import ctypes
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError
from bilevel.outer.generators import Generators, Standing
from bilevel.settings import Stepwise

_NOTHING: Any = object()


class Feed(ABC, Iterator[Any]):
    """Batches without end that know where they stand."""

    @abstractmethod
    def watch(self) -> None:
        """Note, from here on, what `state_dict` needs."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where they stand."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; before the first batch is asked for."""


class Stream(Feed):
    """The batches of one iterable again and again; an error if a round is empty.

    Where they stand is the number of the batch in its round, and what generators stood at when the
    round began and before its last batch. Batches with a `state_dict` say themselves where they
    are; those by the step are found by their number.
    """

    def __init__(self, batches: Iterable[Any] | Stepwise, name: str = "batches") -> None:
        """Begin at the first."""
        self._batches: Any = batches
        self._name: str = name
        self._source: Any = getattr(batches, "source", batches)
        self._taken = self._in_round = 0
        self._round: Iterator[Any] | None = None  # the one that goes on
        self._own: Generators | None = None  # of the batches; None where nobody watches
        self._begun: tuple[Standing, dict[str, Any]] | None = None  # when the round began
        self._before: Standing | None = None  # before the last batch
        self._last: Any = _NOTHING

    def __next__(self) -> Any:
        if isinstance(self._batches, Stepwise):  # it knows its epochs, each in its own order
            self._taken += 1
            return self._batches.at(self._taken)
        if self._round is not None:
            batch = self._drawn()
            if batch is not _NOTHING:
                return batch
        self._begin()
        batch = self._drawn()
        if batch is _NOTHING:
            raise ArgumentError(self._empty())
        return batch

    def _begin(self) -> None:
        if self._own is not None:
            self._begun = Standing.now(), self._own.state_dict()
        self._round, self._in_round = iter(self._batches), 0

    def _drawn(self) -> Any:
        if self._own is not None:
            self._before = Standing.now()
        batch = next(self._round or iter(()), _NOTHING)
        if batch is not _NOTHING:
            self._taken, self._in_round, self._last = self._taken + 1, self._in_round + 1, batch
        return batch

    def _empty(self) -> str:
        if not self._taken:
            return (
                f"{self._name} gave nothing: pass a list or a DataLoader with at least one batch; "
                "an iterator can be read only once."
            )
        return (
            f"{self._name} gave {self._taken} batches, then ended, since an iterator (zip, map, a "
            "generator) is read only once: pass a list, a DataLoader, or for a bilevel problem a "
            "pair of them, batches=(inner_loader, outer_loader)."
        )

    def watch(self) -> None:  # noqa: D102
        if not (isinstance(self._batches, Stepwise) or _is_stateful(self._source)):
            self._own = Generators(self._source)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        found: dict[str, Any] = {"taken": self._taken}
        if isinstance(self._batches, Stepwise):
            return found
        if _is_stateful(self._source):
            return {**found, "own": self._source.state_dict()}
        if self._begun is None or self._before is None:
            return found
        default, own = self._begun
        return {
            **found,
            "in round": self._in_round,
            "round": {"default": default.state_dict(), "own": own},
            "before": self._before.state_dict(),
            "last": fingerprint(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._taken = state["taken"]
        if "own" in state:
            self._source.load_state_dict(state["own"])
        elif "round" in state:
            now = Standing.now()
            self._go_to(state)
            now.restore()

    def _go_to(self, state: Mapping[str, Any]) -> None:
        """Begin the round again where generators stood then, and pass over what was taken."""
        self._in_round = state["in round"]
        self._own = Generators(self._source)
        self._own.load_state_dict(state["round"]["own"])
        default = Standing.of(state["round"]["default"])
        default.restore()
        self._begun, self._before = (default, state["round"]["own"]), Standing.of(state["before"])
        self._round = stream = iter(self._batches)
        for k in range(1, self._in_round + 1):
            if k == self._in_round:
                self._before.restore()
            self._last = next(stream, _NOTHING)
        if self._last is _NOTHING or fingerprint(self._last) != state["last"]:
            raise ArgumentError(
                f"{self._name} cannot be begun again at batch {self._in_round} of their round: "
                "another batch stands there than when the checkpoint was written. Pass the same "
                "data in the same order: Minibatches, a list, a DataLoader, or what has a "
                "state_dict and a load_state_dict of its own."
            )


class Grouped(Feed):
    """So many batches at a time."""

    def __init__(self, batches: Iterable[Any], size: int) -> None:
        """Of one iterable."""
        stream = batches if isinstance(batches, Feed) else Stream(batches)
        self._stream, self._size = stream, size

    def __next__(self) -> list[Any]:
        return [next(self._stream) for _ in range(self._size)]

    def watch(self) -> None:  # noqa: D102
        self._stream.watch()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._stream.load_state_dict(state)


class Pairs(Feed):
    """One batch of each of two streams."""

    def __init__(self, inner: Iterable[Any], outer: Iterable[Any]) -> None:
        """Each begun again when it ends."""
        self._inner = Stream(inner, "the inner loader")
        self._outer = Stream(outer, "the outer loader")

    def __next__(self) -> tuple[Any, Any]:
        return next(self._inner), next(self._outer)

    def watch(self) -> None:  # noqa: D102
        self._inner.watch()
        self._outer.watch()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"inner": self._inner.state_dict(), "outer": self._outer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._inner.load_state_dict(state["inner"])
        self._outer.load_state_dict(state["outer"])


def feed(batches: Iterable[Any]) -> Feed:
    """Batches as a loop takes them."""
    return batches if isinstance(batches, Feed) else Stream(batches)


def paired(batches: Any) -> Feed:
    """Pairs (inner_batch, outer_batch), from an iterable of them or from a pair of iterables."""
    if not isinstance(batches, tuple) or len(batches) != 2:
        return Stream(_Checked(batches))
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
        if _is_one_batch(part):
            raise ArgumentError(
                f"the {name} part of the pair is a {type(part).__name__} of tensors, one batch "
                "(inputs, targets) which would be read as a loader of two: for the same batches at "
                "all updates write batches=[(inner_batch, outer_batch)]."
            )
    return Pairs(*batches)


def _is_one_batch(part: Any) -> bool:
    """Whether it looks like (inputs, targets), not like a list of batches."""
    if not isinstance(part, tuple | list) or not all(isinstance(x, Tensor) for x in part):
        return False
    return isinstance(part, tuple) or len({(x.dtype, x.ndim) for x in part}) > 1


class _Checked:
    """An iterable of batches, each a pair.

    Attributes:
        source: the batches.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        if not isinstance(batches, Iterable):
            raise ArgumentError(
                "batches must be an iterable of pairs (inner_batch, outer_batch), got "
                f"{type(batches).__name__}."
            )
        self.source = self._batches = batches

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


def _is_stateful(value: Any) -> bool:
    """Whether it says by itself where it stands."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def fingerprint(batch: Any) -> str:
    """What tells one batch from another: the tensors and numbers in it."""
    found = hashlib.sha256()
    for leaf in tree.leaves_of(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.numel():
            plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
            found.update(str((plain.dtype, tuple(plain.shape))).encode())
            found.update((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))
        elif isinstance(leaf, int | float | complex | str | bytes):
            found.update(repr(leaf).encode())
        else:
            found.update(type(leaf).__name__.encode())
    return found.hexdigest()[:16]
