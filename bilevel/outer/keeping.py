"""Runs that outlive faults: what is kept while they go on, and what they go on from."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.checks import check_kind, is_whole
from bilevel.errors import ArgumentError, BilevelError, DivergenceError, StorageError
from bilevel.outer.checkpoints import Checkpoint, Folder
from bilevel.outer.encoding import Encoder, Records, decoded, described, first_not_finite
from bilevel.outer.keep import Keep
from bilevel.outer.signals import Interrupts

logger = logging.getLogger("bilevel")
# What must be finite: variables, moments, inner states, linear solutions. A best value so far may
# begin at infinity.
_INNER = "parts.history"
_FINITE = ("descent.control", "optimizer", f"{_INNER}.last.warm", f"{_INNER}.warm")


class Kept:
    """A run under way, as its loop sees it: `after` each update, `end` when it is over.

    Attributes:
        state: what the run goes on from; None where it begins.
    """

    def __init__(
        self,
        keep: Keep | None,
        folder: Folder | None,
        records: Records,
        interrupts: Interrupts,
        conditions: Any = None,
    ) -> None:
        # Made by `opened`.
        self._keep, self._folder, self._records = keep, folder, records
        self._interrupts, self._conditions = interrupts, conditions
        self._written: int | None = None
        self._seen = 0  # the last update that it was told of
        self._chosen: Checkpoint | None = None  # from which the run goes on
        # Good states where nothing is written, the newest last; None where nobody goes back.
        self._good: list[tuple[int, Any, dict[str, Tensor]]] | None = None
        self.state: Any = None

    def remember(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Know a good state from the beginning on."""
        if self._folder is None:
            self._good = []
        if self.state is None:
            self.save(0, state)

    @property
    def within(self) -> bool:
        """Whether sweeps of updates are kept too: also those of the first, from what it begins."""
        return self._keep is not None and self._keep.within is not None

    @property
    def active(self) -> bool:
        """Whether states are asked for."""
        return self._folder is not None or self._good is not None

    def good(self, before: int | None) -> tuple[int, Any]:
        """The last good state, or the last before an update, and after which update it was."""
        if self._folder is None:
            assert self._good  # `remember` was called
            older = [one for one in self._good if before is None or one[0] < before]
            self._good = older or self._good[:1]
            update, plain, tensors = self._good[-1]
        else:
            there = self._folder.checkpoints()
            older = [one for one in there if before is None or one.update < before]
            chosen = (older or there[-1:])[0]
            content, tensors = self._folder.read(chosen)
            self._folder.drop_after(chosen.update)
            update, plain = chosen.update, content["state"]
        return update, self._decoded(plain, tensors)

    def _decoded(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: decoded(value, tensors, self._records) for name, value in plain.items()}

    def after(self, update: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Told of an update; keeps it if it is its turn, or a signal waits, which is then raised.

        Args:
            update: that was made.
            state: gives what the run would go on from.

        Raises:
            StorageError: if the checkpoint cannot be written.
            DivergenceError: if what would be kept is not finite.
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM.
        """
        if not self.active:
            return
        waits = self._interrupts.came is not None
        every = 50 if self._keep is None else self._keep.every
        # A multiple of `every` was reached or, by what counts in larger steps, passed.
        turn, self._seen = update // every > self._seen // every, update
        if waits or turn:
            self.save(update, state)
        if waits:
            self._interrupts.deliver()

    def end(self, update: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """The run is over: keeps what it ended with."""
        if self._folder is not None and self._written != update:
            self.save(update, state)

    def save(self, update: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keeps a state now."""
        now = state()
        plain, tensors = self._encoded(update, now)
        if self._folder is not None:
            content = {"conditions": self._conditions, "state": plain}
            self._folder.write(update, content, tensors, now.get("files", ()))
            self._written = update
        elif self._good is not None:
            older = [one for one in self._good if one[0] < update]
            self._good = [*older[-2:], (update, plain, tensors)]

    def forget(self) -> None:
        """Let go of `state`, which the run has taken over."""
        self.state = None

    def put(self, value: Any) -> str:
        """Writes what several checkpoints have in common; what a state has under "files" names it.

        Args:
            value: as a state may hold it.

        Returns:
            Its name.

        Raises:
            StorageError: if it cannot be written.
        """
        assert self._folder is not None  # a run that is kept
        encoder = Encoder(self._records)
        return self._folder.put(encoder.plain(value, "part"), encoder.tensors)

    def get(self, name: str) -> Any:
        """What `put` was given, of the checkpoint that the run goes on from.

        Args:
            name: that `put` returned.

        Returns:
            The value.

        Raises:
            StorageError: if it cannot be read, or is not what was written.
        """
        assert self._folder is not None
        assert self._chosen is not None
        plain, tensors = self._folder.get(name, self._chosen)
        return decoded(plain, tensors, self._records)

    def _encoded(self, update: int, state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        also = None if self._keep is None else self._keep.also
        whole = {**state, "also": None if also is None else also.state_dict()}
        encoder = Encoder(self._records)
        plain = {name: encoder.plain(value, name) for name, value in whole.items()}
        bad = first_not_finite(encoder.tensors, _FINITE)
        if bad is not None:
            raise DivergenceError(
                f"iteration {update}: {bad} is not finite, although cost, gradient and control are;"
                " such a state is not kept. Take a smaller learning rate, or a wider dtype."
            )
        return plain, encoder.tensors

    def load_also(self, state: Mapping[str, Any]) -> None:
        """Give what is kept beside the run back to where it came from."""
        if self._keep is not None and self._keep.also is not None:
            self._keep.also.load_state_dict(state["also"])

    def load(self, resume: bool | int) -> None:
        """Find what the run goes on from."""
        folder = self._folder
        assert folder is not None  # `opened` saw to it
        there = folder.checkpoints()
        if resume is False and there:
            raise ArgumentError(
                f"{folder.path} holds checkpoints of an earlier run, the newest after update "
                f"{there[0].update}: pass resume=True to go on from it, or choose another folder."
            )
        if not there or resume is False:
            return
        chosen = there[0] if resume is True else _numbered(there, resume, folder.path)
        content, tensors = folder.read(chosen)
        try:
            _compare(content["conditions"], self._conditions, chosen.path)
            self.state = self._decoded(content["state"], tensors)
        except BilevelError:
            raise
        except Exception as error:  # of what has a checksum, and yet was not written here
            raise StorageError(
                f"{chosen.path}: the checkpoint holds no state of a run "
                f"({type(error).__name__} {str(error)[:200]}); start anew in another folder."
            ) from error
        folder.drop_after(chosen.update)
        self._written = self._seen = chosen.update
        self._chosen = chosen
        self.load_also(self.state)


def _numbered(there: list[Checkpoint], update: int, path: Path) -> Checkpoint:
    for one in there:
        if one.update == update:
            return one
    raise ArgumentError(
        f"{path} holds no checkpoint after update {update}, those there are of updates "
        f"{', '.join(str(one.update) for one in reversed(there))}."
    )


def _compare(was: Any, now: Any, path: Path) -> None:
    old, new = dict(_flat(was, "")), dict(_flat(now, ""))
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    if names:
        shown = "; ".join(f"{n} was {old.get(n)}, is {new.get(n)}" for n in sorted(names)[:12])
        more = f"; and {len(names) - 12} more" if len(names) > 12 else ""
        raise ArgumentError(
            f"{path}: a run goes on under the same settings only: {shown}{more}. Restore them, or "
            "start anew in another folder."
        )


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Settings by where they stand, such as `solver.inner_steps`."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}".strip("."))
    elif isinstance(value, list) and any(isinstance(x, Mapping) for x in value):
        for i, part in enumerate(value):
            yield from _flat(part, f"{name}[{i}]")
    else:
        yield name, value


@contextmanager
def opened(
    keep: Keep | None,
    resume: bool | int = False,
    conditions: Mapping[str, Any] | None = None,
    records: Records | None = None,
) -> Iterator[Kept]:
    """A run that is kept: what a loop of one's own needs to outlive faults as `solve` does.

    Args:
        keep: where and how often; None keeps nothing.
        resume: go on from the newest checkpoint, or from that after a given update; where there is
            none, begin.
        conditions: settings that must be the same when the run goes on, beside those of `keep`.
        records: dataclasses that its state may hold, by their names.

    Yields:
        What the loop tells of its updates; its `state` is what to go on from.

    Raises:
        ArgumentError: if the folder is none of checkpoints, of another problem or other settings,
            or holds an earlier run and `resume` is False.
        StorageError: if the folder cannot be used, or a checkpoint is damaged.
    """
    check_kind(keep, Keep | None, "keep", "a Keep(folder)")
    if not (isinstance(resume, bool) or is_whole(resume)):
        raise ArgumentError(f"resume must be True, False or a number of updates, got {resume!r}.")
    if keep is None:
        if resume is not False:
            raise ArgumentError(
                "resume needs the folder to go on from, got no keep: pass keep=Keep(folder)."
            )
        yield Kept(None, None, records or {}, Interrupts())
        return
    folder = Folder(Path(keep.folder), keep.last)
    told = json.loads(json.dumps(described({**(conditions or {}), **keep.conditions})))
    with folder.held(), Interrupts() as interrupts:
        kept = Kept(keep, folder, records or {}, interrupts, told)
        kept.load(resume)
        yield kept
