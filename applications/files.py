"""Files that either are complete or do not appear."""

import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from applications.errors import InputError

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

_made: ContextVar[list[Path] | None] = ContextVar("made", default=None)


@contextmanager
def no_empty_folders() -> Iterator[None]:
    """Where something goes wrong inside, folders that were made for files which never came go."""
    made: list[Path] = []
    token = _made.set(made)
    try:
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # it holds something, or is gone
                folder.rmdir()
        raise
    finally:
        _made.reset(token)


def make_folder(folder: Path) -> Path:
    """Makes a folder, if need be, and makes sure that files can be written there.

    Args:
        folder: to write to.

    Returns:
        The folder.

    Raises:
        InputError: if it cannot be made or written.
    """
    lacking = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (made := _made.get()) is not None:
            made += reversed(lacking)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise InputError(
            f"{folder}: the folder cannot be made ({error}); choose another."
        ) from error
    if not writable:
        raise InputError(f"{folder}: the folder cannot be written; choose another.")
    return folder


def make_place(path: Path) -> None:
    """Makes the folder of a file to be written, and makes sure that the file can be.

    Args:
        path: the file.

    Raises:
        InputError: if its folder cannot be made or written, or it is a folder itself, or a link, a
            device or a pipe, or protected from writing.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{path}: a file will be written, this is a folder; add a file name.")
    _check_regular(path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, renamed into place when all is written.

    Args:
        path: the file in the end, replaced if it exists.

    Yields:
        Where to write.

    Raises:
        InputError: if the file cannot be written, or is no regular one; whatever goes wrong,
            nothing of it is left.
    """
    _check_regular(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        # As open makes files, so that the mask of the user says who may read them.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise InputError(
            f"{path}: the folder cannot be written ({error}); choose another."
        ) from error
    try:
        yield temporary
        with suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"{path}: the file cannot be written ({error}); choose another."
            ) from error
        raise


def _check_regular(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # renaming onto a folder fails by itself
        what = "a link" if stat.S_ISLNK(mode) else "a device or pipe"
        raise InputError(
            f"{path}: a regular file will be written, {what} lies there; choose another name."
        )
    if stat.S_ISREG(mode) and not mode & _WRITABLE:
        raise InputError(
            f"{path}: the file that lies there is protected from writing; choose another name, or "
            "let it be written (chmod u+w)."
        )


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` as a `whole_file`.

    Args:
        path: the file, replaced if it exists.
        content: all of it.

    Raises:
        InputError: if the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: object) -> None:
    """Writes `content` as JSON, whole; an infinite number becomes null, as JSON has no infinity.

    Args:
        path: the file, replaced if it exists.
        content: mappings with names, sequences, and plain values.

    Raises:
        InputError: if the file cannot be written.
        ValueError: if a number is NaN, which is never a result.
    """
    write_whole(path, json.dumps(_finite(content), indent=1, allow_nan=False).encode())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and math.isinf(content) else content
