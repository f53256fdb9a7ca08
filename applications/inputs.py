"""The gate that files from strangers pass: what may be read, and how much it may announce.

Every reader of the applications goes through it. A file is a regular one, read no further than its
size; what it announces is compared with its size before anything is read or allocated; whatever
goes wrong while it is read is one `InputError`, which names the file.
"""

import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from xml.parsers import expat

from applications.errors import InputError

FREE = 2**27  # bytes that any file may announce
MOST_TIMES = 100  # larger than itself is what a larger file may announce, packed
_GZIP = b"\x1f\x8b"
_PIECE = 2**20  # bytes unpacked at a time
_NAMES = 20  # listed in a message
_LONGEST = 300  # characters of what another package says
_MOST_XML = 2**22  # bytes

_followed: ContextVar[bool] = ContextVar("links followed", default=False)


@contextmanager
def following_links(follow: bool = True) -> Iterator[None]:
    """Lets HDF5 files that are opened in it read other files: links, external storage, and parts.

    Args:
        follow: False changes nothing.

    Yields:
        While it holds, for this thread; readers made in it keep the permission.
    """
    token = _followed.set(follow or _followed.get())
    try:
        yield
    finally:
        _followed.reset(token)


def links_followed() -> bool:
    """Whether HDF5 files may read other files here."""
    return _followed.get()


@contextmanager
def reading(path: Path, what: str, remedy: str = "copy or download it again") -> Iterator[None]:
    """Words whatever goes wrong while a file is read.

    Args:
        path: the file.
        what: was needed, with its article, and the key where there is one.
        remedy: what to do.

    Yields:
        While it is read.

    Raises:
        InputError: for every error but those of missing packages, and interrupts.
        ModuleNotFoundError: for those.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except PermissionError as error:
        raise InputError(
            f"{path}: the file may not be read ({said(error)}); change its permissions."
        ) from error
    except Exception as error:  # of a package, whatever a damaged file leads to
        raise InputError(
            f"{path}: {what} was needed, it cannot be read ({said(error)}); {remedy}."
        ) from error


def said(error: BaseException) -> str:
    """What an error says, in a bounded line; its kind where it says little."""
    text = " ".join(str(error)[: 4 * _LONGEST].split())
    if isinstance(error, KeyError | MemoryError | RecursionError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def listed(names: Iterable[object]) -> str:
    """Names in a message: sorted, and only the first where there are many."""
    each = sorted(str(one) for one in names)
    more = f" and {len(each) - _NAMES} more" if len(each) > _NAMES else ""
    return f"{[one[:_LONGEST] for one in each[:_NAMES]]}{more}"


def checked_size(path: Path, what: str) -> int:
    """The size of a regular file.

    Args:
        path: the file; a link is followed.
        what: was needed, with its article.

    Returns:
        Bytes.

    Raises:
        InputError: if there is no such file; it is a folder, a pipe or a device; or little but
            holes.
    """
    try:
        found = path.stat()
    except PermissionError as error:
        raise InputError(
            f"{path}: the file may not be looked at ({said(error)}); change the permissions of its "
            "folder."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {what} was needed, there is no such file; check the path."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise InputError(
            f"{path}: {what} was needed, there is no such file but {kind}; check the path."
        )
    if found.st_size > max(FREE, MOST_TIMES * 512 * found.st_blocks) and _has_holes(path):
        raise InputError(
            f"{path}: {what} was needed, of the {found.st_size} bytes of this file all but "
            f"{512 * found.st_blocks} are holes; copy it again."
        )
    return found.st_size


def _has_holes(path: Path) -> bool:
    """Whether the file system knows parts of a file to be empty; some count no blocks at all."""
    with reading(path, "a file"):
        place = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.lseek(place, 0, os.SEEK_HOLE) < os.fstat(place).st_size
        finally:
            os.close(place)


def check_announced(path: Path, what: str, n_bytes: int, size: int) -> None:
    """Refuses what is far larger than the file that announces it.

    Args:
        path: the file.
        what: is announced, in words.
        n_bytes: of it in memory.
        size: of the file.

    Raises:
        InputError: if it is.
    """
    if n_bytes > max(FREE, MOST_TIMES * size):
        raise InputError(
            f"{path}: {what} is announced with {n_bytes} bytes, in a file of {size}; at most "
            f"{max(FREE, MOST_TIMES * size)} were expected. Copy or export it again."
        )


def content(path: Path, what: str, most: int) -> bytes:
    """All of a file.

    Args:
        path: the file.
        what: was needed, with its article.
        most: bytes.

    Returns:
        As many bytes as the file says it has.

    Raises:
        InputError: if it is no regular file, is larger, or cannot be read.
    """
    size = checked_size(path, what)
    if size > most:
        raise InputError(
            f"{path}: {what} of at most {most} bytes was needed, got {size}; check which file this "
            "is."
        )
    with reading(path, what):
        place = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(place, "rb") as file:
            return file.read(size)


def unpacked(path: Path, packed: bytes, what: str, most: int | None = None) -> bytes:
    """The content of gzip, no further than files may announce; other content as it is.

    Args:
        path: the file, for messages.
        packed: its content.
        what: was needed, with its article.
        most: bytes, fewer than files may announce; what comes after them is not unpacked.

    Returns:
        The content.

    Raises:
        InputError: if it is damaged, or is too large.
    """
    if not packed.startswith(_GZIP):
        return packed
    allowed = max(FREE, MOST_TIMES * len(packed))
    enough = allowed if most is None else min(most, allowed)
    pieces, n, rest = [], 0, packed
    with reading(path, what):
        while rest:
            member = zlib.decompressobj(31)
            while not member.eof:
                piece = member.decompress(rest, _PIECE)
                rest = member.unconsumed_tail
                _check_progress(member, piece, rest)
                pieces.append(piece)
                n += len(piece)
                if n > enough:
                    if enough == most:
                        return b"".join(pieces)[:most]
                    check_announced(path, what, n, len(packed))
            rest = member.unused_data.lstrip(b"\0")
            rest = rest if rest.startswith(_GZIP) else b""
    return b"".join(pieces)


def _check_progress(member: Any, piece: bytes, rest: bytes) -> None:
    if not piece and not rest and not member.eof:
        raise EOFError("the end of the packed data is missing")


class _DocumentTypeError(Exception):
    """No ValueError, since those say that it is no XML, which is left to its reader."""


def _refuse(*_: object) -> None:
    raise _DocumentTypeError


def checked_xml(path: Path, document: bytes | str, what: str) -> bytes | str:
    """XML that declares no entities of its own, which could read files or grow without end.

    Args:
        path: the file that holds it.
        document: the text.
        what: was needed, with its article.

    Returns:
        The document; whether it is XML at all, its reader will say.

    Raises:
        InputError: if it is too long, or has a document type.
    """
    if len(document) > _MOST_XML:
        raise InputError(
            f"{path}: {what} must have at most {_MOST_XML} bytes, got {len(document)}; shorten it."
        )
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse
    try:
        with suppress(expat.ExpatError, ValueError, LookupError):
            parser.Parse(document, True)
    except _DocumentTypeError:
        raise InputError(
            f"{path}: {what} must have no document type (DOCTYPE); remove it there."
        ) from None
    return document
