"""What may be written where: nothing that a user has is lost, and no two runs write one file."""

import json
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from applications.errors import InputError
from applications.files import make_folder, make_place
from applications.inputs import content

_MOST_BYTES = 2**28  # of a file of results
DRAWN = {"Software": "bilevel"}  # in the pictures of this program, and in no other's


@dataclass(frozen=True)
class Kind:
    """A kind of file that a program writes.

    Attributes:
        name: in messages, with its article.
        recognises: whether an existing file is of this kind; it may raise what reading it raises.
    """

    name: str
    recognises: Callable[[Path], bool]

    def holds(self, path: Path) -> bool:
        """Whether a file is of this kind; what cannot be read is not."""
        try:
            return self.recognises(path)
        except Exception:  # of HDF5, zlib, JSON or the operating system: the file is something else
            return False


def _is_drawn(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4096)
    mark = b"".join(b"tEXt%b\0%b" % (k.encode(), v.encode()) for k, v in DRAWN.items())
    return start.startswith(b"\x89PNG\r\n\x1a\n") and mark in start


PICTURE = Kind("a picture that this program drew", _is_drawn)


def results(*keys: str, records: Mapping[str, Collection[str]] | None = None) -> Kind:
    """Results in JSON.

    Args:
        keys: that they have.
        records: keys of the records in some of their lists, by the name of the list.

    Returns:
        The kind of file.
    """
    inner = records or {}

    def recognises(path: Path) -> bool:
        found = json.loads(content(path, "results", _MOST_BYTES))
        return set(keys) | set(inner) <= set(found) and all(
            set(names) <= set(one) for name, names in inner.items() for one in found[name]
        )

    return Kind("a file of such results", recognises)


@dataclass(frozen=True)
class Output:
    """A file that will be written.

    Attributes:
        path: of the file.
        kind: what it will hold; an existing file of another kind is not replaced.
    """

    path: Path
    kind: Kind


def check_outputs(outputs: Sequence[Output], inputs: Iterable[Path] = ()) -> None:
    """Refuses to write over what are no earlier outputs of the same kind.

    Args:
        outputs: files that will be written.
        inputs: files that are read.

    Raises:
        InputError: if a file cannot be written, is an input or no regular file, or holds something
            else; or if two outputs are one file.
    """
    read = {_identity(one) for one in inputs}
    places: set[Path] = set()
    for one in outputs:
        path = one.path
        make_place(path)
        if _identity(path) in read:
            raise InputError(f"{path}: the output must not be an input, it is one; choose another.")
        place = path.parent.resolve() / path.name
        if place in places:
            raise InputError(
                f"{path}: each output needs a file of its own, two have this one; choose another."
            )
        places.add(place)
        if path.exists() and path.stat().st_size and not one.kind.holds(path):
            raise InputError(
                f"{path}: a file lies there that is not {one.kind.name}, it would be lost; choose "
                "another name, or move it away."
            )


@contextmanager
def claimed(
    outputs: Sequence[Output], inputs: Iterable[Path] = (), folder: Path | None = None
) -> Iterator[None]:
    """Holds the places of outputs, so that no other run writes them; checks them before.

    Args:
        outputs: files that will be written.
        inputs: files that are read.
        folder: of outputs, held as a whole; made if need be.

    Yields:
        While they are held.

    Raises:
        InputError: as in `check_outputs`, or if another run holds one.
    """
    check_outputs(outputs, inputs)
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(_lock(make_folder(folder) / ".lock", folder))
        for one in outputs:
            lock = one.path.with_name(f".{one.path.name[:200]}.lock")
            stack.enter_context(_lock(lock, one.path))
        yield


@contextmanager
def _lock(place: Path, path: Path) -> Iterator[None]:
    with suppress(OSError):  # nothing is there
        there = place.lstat()
        if there.st_size or not stat.S_ISREG(there.st_mode):
            raise InputError(
                f"{path}: the place of its lock, {place}, must be free, something lies there that "
                "is no lock; move it away, or choose another output."
            )
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError) as error:
        if isinstance(error, Timeout) and place.exists():
            raise InputError(
                f"{path}: another run is writing there; wait for its end, or choose another place."
            ) from None
        raise InputError(
            f"{path}: the place cannot be locked ({error}); choose another."
        ) from error
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is held: who waits for the old file tries anew
        lock.release()


def _identity(path: Path) -> object:
    """What tells whether two paths are one file: links are followed."""
    try:
        found = path.stat()
    except OSError:  # there is none
        return path.resolve()
    return found.st_dev, found.st_ino
