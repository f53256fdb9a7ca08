"""What may be written where: nothing that a user has is lost, and no two runs write one file."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from applications.errors import InputError
from applications.files import make_folder, make_place


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
    return start.startswith(b"\x89PNG\r\n\x1a\n") and b"Matplotlib" in start


PICTURE = Kind("a picture that this program drew", _is_drawn)


def results(*keys: str) -> Kind:
    """Results in JSON.

    Args:
        keys: that they have.

    Returns:
        The kind of file.
    """

    def recognises(path: Path) -> bool:
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and set(keys) <= set(content)

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

    def check(self, inputs: Iterable[Path] = ()) -> None:
        """Refuses to write over what is not an earlier output of the same kind.

        Args:
            inputs: files that are read.

        Raises:
            InputError: if the file cannot be written, is an input or no regular file, or holds
                something else.
        """
        make_place(self.path)
        for one in inputs:
            if _same(one, self.path):
                raise InputError(
                    f"{self.path}: the output must not be an input, it is {one}; choose another."
                )
        if self.path.exists() and self.path.stat().st_size and not self.kind.holds(self.path):
            raise InputError(
                f"{self.path}: a file lies there that is not {self.kind.name}, it would be lost; "
                "choose another name, or move it away."
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
        InputError: if an output cannot be written without loss, two are one file, or another run
            holds one.
    """
    inputs = list(inputs)
    for k, one in enumerate(outputs):
        for other in outputs[:k]:
            if _same(one.path, other.path):
                raise InputError(
                    f"{one.path}: each output needs a file of its own, two have this one; choose "
                    "another."
                )
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(_lock(make_folder(folder) / ".lock", folder))
        for one in outputs:
            one.check(inputs)
            lock = one.path.with_name(f".{one.path.name[:200]}.lock")
            stack.enter_context(_lock(lock, one.path))
        yield


@contextmanager
def _lock(place: Path, path: Path) -> Iterator[None]:
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


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one does not exist
        return one.resolve() == other.resolve()
