"""A folder of checkpoints: whole files, each with its checksum in its name, and one writer.

What many checkpoints have in common is written once, as a *part* that they name.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.errors import ArgumentError, StorageError, UnsupportedError

FORMAT = 1  # of the files; a higher one is of a newer version
_NAME = re.compile(r"update-(\d{9,})-([0-9a-f]{32})\.safetensors")
_PART = re.compile(r"part-([0-9a-f]{32})\.safetensors")
_KEY = "bilevel checkpoint"
_PARTS = "parts"
_SMALL, _MOST_HOLES = 2**27, 100  # bytes; times as large as on the disk
_TEMPORARY = ".writing-"
INSIDE = ".inside"  # a folder for what is kept between two checkpoints, each in one of its own


@dataclass(frozen=True)
class Checkpoint:
    """A file in the folder, whatever may be in it.

    Attributes:
        path: of the file.
        update: after which it was written.
        digest: of its content, as its name says.
    """

    path: Path
    update: int
    digest: str


@dataclass(frozen=True)
class Folder:
    """Where checkpoints are.

    Attributes:
        path: of the folder, which holds nothing else.
        last: how many are left there.
    """

    path: Path
    last: int

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, and holds it against other runs; cleans up what a killed one left.

        Yields:
            While it is held.

        Raises:
            StorageError: if it cannot be made, written or locked, or another run holds it.
            ArgumentError: if it holds something that is no checkpoint, and no checkpoint.
        """
        _needed()
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"{self.path}: another run keeps its checkpoints there; wait for its end, or "
                "choose another folder."
            ) from None
        except OSError as error:
            raise StorageError(
                f"{self.path}: the folder cannot be made or written ({error.strerror or error}); "
                "choose another."
            ) from error
        try:
            for stale in self.path.glob(f"{_TEMPORARY}*"):
                stale.unlink(missing_ok=True)
            self._drop_parts()
            self._check()
            yield
        finally:
            lock.release()

    def _check(self) -> None:
        others = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        if others and not self.checkpoints():
            raise ArgumentError(
                f"{self.path} is no folder of checkpoints: it holds {sorted(others)[0]!r} and no "
                "checkpoint; give a folder that is new or empty, or that an earlier run kept."
            )

    def checkpoints(self) -> list[Checkpoint]:
        """Those there are, by their names alone, the newest first."""
        named = ((p, _NAME.fullmatch(p.name)) for p in self.path.iterdir())
        found = [Checkpoint(p, int(m[1]), m[2]) for p, m in named if m is not None]
        return sorted(found, key=lambda one: (one.update, one.path.name), reverse=True)

    def write(
        self,
        update: int,
        content: Mapping[str, Any],
        tensors: dict[str, Tensor],
        parts: Sequence[str] = (),
    ) -> Path:
        """Writes a checkpoint that either is complete or does not appear, and drops old ones.

        Args:
            update: after which.
            content: plain values.
            tensors: on the CPU.
            parts: files that `put` wrote and the checkpoint needs; others are dropped.

        Returns:
            The file.

        Raises:
            StorageError: if it cannot be written; those before it stay.
        """
        path = self._written(f"update-{update:09d}", content, tensors, parts)
        for old in self.checkpoints():
            if old.update == update and old.path != path:
                old.path.unlink(missing_ok=True)
        for old in self.checkpoints()[self.last :]:
            old.path.unlink(missing_ok=True)
        self._drop_parts()
        shutil.rmtree(self.path / INSIDE, ignore_errors=True)
        return path

    def put(self, content: Any, tensors: dict[str, Tensor]) -> str:
        """Writes a part, for checkpoints that will name it; until then it is nobody's.

        Args:
            content: plain values.
            tensors: on the CPU.

        Returns:
            The name of its file.

        Raises:
            StorageError: if it cannot be written.
        """
        return self._written("part", content, tensors).name

    def _written(
        self, stem: str, content: Any, tensors: dict[str, Tensor], parts: Sequence[str] = ()
    ) -> Path:
        """Written aside, synchronised, and renamed."""
        from safetensors.torch import save

        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
        about = {_KEY: text, "format": str(FORMAT)}
        data = save(tensors, {**about, _PARTS: json.dumps(sorted({*parts}))} if parts else about)
        path = self.path / f"{stem}-{_digest(data)}.safetensors"
        temporary = None
        try:
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self.path)
            temporary = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(self.path)
        except OSError as error:
            raise StorageError(
                f"{path}: the checkpoint cannot be written ({error.strerror or error}). Those "
                "before it are whole; free space, or choose another folder."
            ) from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return path

    def _drop_parts(self) -> None:
        """Removes what no checkpoint names any more."""
        there = [p for p in self.path.iterdir() if _PART.fullmatch(p.name)]
        if there:
            named = {name for one in self.checkpoints() for name in _parts_of(one)}
            for path in there:
                if path.name not in named:
                    path.unlink(missing_ok=True)

    def read(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `write` was given.

        Args:
            checkpoint: one of the folder.

        Returns:
            Plain values, and tensors.

        Raises:
            StorageError: if the file is not the one that was written, or is of a newer version; the
                message offers the one before.
        """
        return self._read(checkpoint.path, checkpoint.digest, checkpoint)

    def get(self, name: str, checkpoint: Checkpoint) -> tuple[Any, dict[str, Tensor]]:
        """What `put` was given.

        Args:
            name: that it returned.
            checkpoint: which names it.

        Returns:
            Plain values, and tensors.

        Raises:
            StorageError: as `read` does.
        """
        found = _PART.fullmatch(name)
        return self._read(self.path / name, found[1] if found else "", checkpoint)

    def _read(
        self, path: Path, digest: str, checkpoint: Checkpoint
    ) -> tuple[Any, dict[str, Tensor]]:
        from safetensors.torch import load

        try:
            data = _content(path)
        except OSError as error:
            raise StorageError(
                f"{path}: the checkpoint cannot be read ({error.strerror or error}). "
                f"{self._before(checkpoint)}"
            ) from error
        metadata = _metadata(data)
        version = int(metadata.get("format", "0"))
        if version > FORMAT:
            raise StorageError(
                f"{path}: the checkpoint is of a newer version, format {version}, and this one "
                f"reads up to {FORMAT}: update bilevel, or start anew in another folder."
            )
        if _digest(data) != digest or _KEY not in metadata:
            raise StorageError(
                f"{path}: the checkpoint is truncated or altered, its content has not the checksum "
                f"in its name. {self._before(checkpoint)}"
            )
        try:
            return json.loads(metadata[_KEY]), load(data)
        except Exception as error:  # of what has a checksum, and yet was not written here
            raise StorageError(
                f"{path}: the checkpoint was not written by this library, it cannot be read "
                f"({str(error)[:200] or type(error).__name__}). {self._before(checkpoint)}"
            ) from error

    def _before(self, checkpoint: Checkpoint) -> str:
        """What to go on from instead."""
        for one in self.checkpoints():
            if one.update < checkpoint.update and _whole(one):
                return (
                    f"The one before is whole, {one.path.name}: pass resume={one.update} to go on "
                    f"from there, or remove {checkpoint.path.name}."
                )
        return "There is no whole one before it: start anew in another folder."

    def drop_after(self, update: int) -> None:
        """Removes checkpoints of later updates: the run goes on from this one."""
        for one in self.checkpoints():
            if one.update > update:
                one.path.unlink(missing_ok=True)


def _whole(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint and its parts are what was written."""
    parts = ((name, _PART.fullmatch(name)) for name in _parts_of(checkpoint))
    files = {name: found[1] if found else "" for name, found in parts}
    files[checkpoint.path.name] = checkpoint.digest
    folder = checkpoint.path.parent
    try:
        return all(_digest(_content(folder / n)) == digest for n, digest in files.items())
    except OSError:
        return False


def _parts_of(checkpoint: Checkpoint) -> list[str]:
    """The parts that it names, by its header alone; none where that cannot be read."""
    try:
        _check_file(checkpoint.path)
        with checkpoint.path.open("rb") as file:
            start = file.read(8)
            size = min(int.from_bytes(start, "little"), checkpoint.path.stat().st_size)
            return [str(name) for name in json.loads(_metadata(start + file.read(size))[_PARTS])]
    except (OSError, KeyError, ValueError, TypeError):
        return []


def _content(path: Path) -> bytes:
    """All of a file."""
    _check_file(path)
    return path.read_bytes()


def _check_file(path: Path) -> None:
    """Refuse a pipe or a device, which may have no end, and what is all holes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    if found.st_size > max(_SMALL, _MOST_HOLES * 512 * found.st_blocks):
        raise OSError(f"of its {found.st_size} bytes all but {512 * found.st_blocks} are holes")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _metadata(data: bytes) -> dict[str, str]:
    """That of safetensors; empty where the bytes are none."""
    size = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        int(found.get("format", "0"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return {}
    return found


def _sync(folder: Path) -> None:
    """Make a renaming last through a power cut, where folders can be synchronised."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _needed() -> None:
    try:
        import filelock as filelock
        import safetensors as safetensors
    except ImportError as error:
        raise UnsupportedError(
            f"keep needs safetensors and filelock, and cannot import them ({error}): "
            'pip install "bilevel[keep]".'
        ) from error
