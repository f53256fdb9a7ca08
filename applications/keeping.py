"""Commands that go on after an interruption: what they keep beside their results, until the end."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import bilevel as bl
from applications.errors import InputError

T = TypeVar("T")
# The files of checkpoints as `bilevel.Keep` names them; others that begin so are the user's.
_STATE = re.compile(r"(update-\d{9,}|part)-[0-9a-f]{32}\.safetensors|\.writing-.*")


@dataclass(frozen=True, eq=False)
class Kept:
    """A folder in which a command keeps what it has come to, one folder a part of it.

    Attributes:
        folder: of the parts.
        conditions: plain values that must be the same when the command goes on.
        records: dataclasses that finished parts hold.
        every: updates between two checkpoints.
    """

    folder: Path
    conditions: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[type, ...] = ()
    every: int = 50

    def part(self, name: str) -> "Kept":
        """A folder inside, for the parts of a part."""
        return Kept(self.folder / name, self.conditions, self.records, self.every)

    def keep(self, name: str, also: Any = None) -> bl.Keep:
        """Where a training is kept.

        Args:
            name: of the part.
            also: what belongs to it, see `bilevel.Keep`.

        Returns:
            The folder and how often.
        """
        return bl.Keep(self.folder / name, self.every, also=also, conditions=self.conditions)

    def finished(self, name: str, make: Callable[[], T]) -> T:
        """A part of the results, made once.

        Args:
            name: of the part.
            make: makes it; Ctrl-C waits for its end, or for the next update of a training in it.

        Returns:
            What `make` returned, now or before the interruption.
        """
        known = {kind.__name__: kind for kind in self.records}
        with bl.outer.opened(self.keep(name), True, {}, known) as part:
            if part.state is not None:
                return part.state["found"]
            found = make()
            part.save(1, lambda: {"found": found})
        return found


class Clock:
    """Seconds that were spent, those before an interruption included."""

    def __init__(self) -> None:
        """Start it."""
        self._began = time.perf_counter()

    def start(self) -> None:
        """Start it anew."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it was started [s]."""
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, it stands still."""
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused

    def state_dict(self) -> dict[str, float]:
        """What it shows."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there.

        Args:
            state: what `state_dict` gave.
        """
        self._began = time.perf_counter() - state["seconds"]


def solving(kept: Kept | None, name: str, also: Any = None) -> dict[str, Any]:
    """What `solve` is told of where it is kept; nothing if it is not.

    Args:
        kept: where, or None.
        name: of the part.
        also: what belongs to it.

    Returns:
        Arguments.
    """
    return {} if kept is None else {"keep": kept.keep(name, also), "resume": True}


def finished(kept: Kept | None, name: str, make: Callable[[], T]) -> T:
    """`Kept.finished`, or just made where nothing is kept.

    Args:
        kept: where, or None.
        name: of the part.
        make: makes it.

    Returns:
        The part.
    """
    return make() if kept is None else kept.finished(name, make)


@contextmanager
def going_on(
    folder: Path,
    conditions: Mapping[str, Any],
    records: tuple[type, ...] = (),
    *,
    resume: bool,
    every: int = 50,
) -> Iterator[Kept]:
    """Keeps a command in a folder, which is removed when the command has ended.

    Args:
        folder: of its own.
        conditions: plain values that must be the same when it goes on.
        records: dataclasses that finished parts hold.
        resume: go on with what an interrupted command left there, if it left anything.
        every: updates between two checkpoints.

    Yields:
        Where parts are kept.

    Raises:
        InputError: if an interrupted command left something there, and `resume` is False; or if the
            folder holds files that are no state.
    """
    left = folder.is_dir() and _has_state(folder)
    if left and not resume:
        raise InputError(
            f"{folder}: an interrupted run left its state there; go on with it by --resume, or "
            "remove the folder to begin anew."
        )
    foreign = sorted(p.name for p in folder.glob("*") if p.is_file() and p.name[0] != ".")
    if foreign and not left:
        raise InputError(
            f"{folder} is no folder of an interrupted run: it holds {foreign[0]!r} and no state; "
            "move that elsewhere, or choose another output."
        )
    try:
        yield Kept(folder, conditions, records, every)
    except BaseException:
        if not _has_state(folder):  # there is nothing to go on with
            _remove(folder)
        raise
    _remove(folder)


def _has_state(folder: Path) -> bool:
    return any(_STATE.fullmatch(path.name) for path in folder.rglob("update-*"))


def _remove(folder: Path) -> None:
    """Removes what runs kept there, and the folder unless it holds anything else."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif _STATE.fullmatch(path.name) or (path.name == ".lock" and not path.stat().st_size):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()
