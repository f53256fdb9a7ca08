"""Checked access to HDF5: errors name file, key and remedy, and a file reads no other.

An HDF5 file can be a door to others: external links, datasets whose values lie in any file of the
system, and virtual datasets made of other datasets, of itself even. These are refused, unless the
caller lets them be followed; see `applications.inputs.following_links`.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.inputs import (
    check_announced,
    checked_size,
    links_followed,
    listed,
    reading,
    said,
)
from applications.trials import survives

_LOCKED = ("unable to lock file", "already open for write", "already open for read")
_VIRTUAL: Any = h5py.h5d.VIRTUAL  # pyright: ignore[reportAttributeAccessIssue]
_SOFT: Any = h5py.h5l.TYPE_SOFT  # pyright: ignore[reportAttributeAccessIssue]
_HARD: Any = h5py.h5l.TYPE_HARD  # pyright: ignore[reportAttributeAccessIssue]
_WHAT = "a complete HDF5 file"
_MOST_LINKS = 32  # from one to the next
_SECONDS = 1  # of the processor, for a first look at a file
_TOUCHED, _MOST_OBJECTS = 2**24, 1000  # bytes and objects that are looked at
_REMEMBERED = 4096  # files
_DEEPEST = 8  # virtual datasets of virtual datasets
_REMEDY = "copy the values into the file, or take --follow-links if you trust it"


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds, as far as it may be read.

    Attributes:
        file: the open file.
        path: its path, for messages.
        size: of the file [bytes].
        follow: whether it may read other files.
    """

    file: h5py.File = field(repr=False)
    path: Path
    size: int
    follow: bool

    @property
    def attributes(self) -> Any:
        """Those of the file, by name."""
        return self.file.attrs

    def names(self) -> list[str]:
        """The names at the root, in alphabetical order; nothing is opened."""
        return sorted(self.file)

    def get(self, name: str) -> h5py.Dataset | h5py.Group | None:
        """What lies at a name.

        Args:
            name: path from the root.

        Returns:
            A dataset, unread, whose announced size has been compared with the file; a group; or
            None.

        Raises:
            InputError: if it reads another file, or announces far more than the file holds.
        """
        with reading(self.path, f"{name!r} in {_WHAT}"):
            found = self._walk(name)
            if not isinstance(found, h5py.Dataset):
                return found if isinstance(found, h5py.Group) else None
            self._check_storage(found, name)
            return found

    def read(self, found: h5py.Dataset, where: Any = ()) -> NDArray[Any]:
        """Values of a dataset.

        Args:
            found: by `get` or `dataset`.
            where: index, as h5py takes it; all of it unless stated.

        Returns:
            The values.

        Raises:
            InputError: if they are damaged.
        """
        with reading(self.path, f"{_name(found)!r} in {_WHAT}"):
            return np.asarray(found[where])

    def dataset(self, name: str, kind: str, axes: str) -> h5py.Dataset:
        """A dataset of the expected rank and dtype.

        Args:
            name: key of the dataset.
            kind: NumPy dtype kinds allowed, for example ``"c"`` for complex.
            axes: its axes in words, separated by commas; their number is the rank.

        Returns:
            The dataset, unread.

        Raises:
            InputError: if it is missing, of other rank or dtype, or empty.
        """
        path, found = self.path, self.get(name)
        if not isinstance(found, h5py.Dataset):
            raise InputError(
                f"{path}: dataset {name!r} was needed, the file has {listed(self.names())}; rename "
                "or convert the data."
            )
        if found.shape is None or found.ndim != axes.count(",") + 1:
            raise InputError(
                f"{path}: {name} must have the axes ({axes}), got shape {found.shape}; add or "
                "remove axes."
            )
        if found.dtype.kind not in kind:
            needed = {"c": "complex64", "f": "float32", "u": "uint8"}[kind[0]]
            raise InputError(f"{path}: {name} must be {needed}, got {found.dtype}; convert it.")
        if found.size == 0:
            raise InputError(
                f"{path}: {name} must not be empty, got shape {found.shape}; export it again."
            )
        return found

    def _walk(self, name: str) -> Any:
        """What lies at a name, link by link, as HDF5 would find it."""
        where: Any = self.file["/"]
        parts = deque(name.split("/"))
        hops = 0
        while parts:
            part = parts.popleft()
            if part in {"", "."}:
                continue
            if not isinstance(where, h5py.Group):
                return None
            links, key = where.id.links, part.encode("utf-8", "surrogateescape")
            if not links.exists(key):
                return None
            kind = links.get_info(key).type
            if kind == _SOFT:
                hops += 1
                if hops > _MOST_LINKS:
                    raise InputError(f"{self.path}: links at {name!r} go in circles; mend them.")
                target = _text(links.get_val(key))
                where = self.file["/"] if target.startswith("/") else where
                parts.extendleft(reversed(target.split("/")))
                continue
            if kind != _HARD and not self.follow:
                other = listed(map(_text, links.get_val(key)))
                raise InputError(
                    f"{self.path}: {name!r} is a link to another file, {other}, and is not "
                    f"followed; {_REMEDY}."
                )
            where = where[part]
        return where

    def _check_storage(self, found: h5py.Dataset, name: str) -> None:
        made = found.id.get_create_plist()
        virtual, external = made.get_layout() == _VIRTUAL, made.get_external_count() > 0
        if (virtual or external) and not self.follow:
            what = "a virtual dataset, made of others" if virtual else "stored in other files"
            raise InputError(f"{self.path}: {name!r} is {what}, and is not read; {_REMEDY}.")
        if virtual:
            _check_sources(found, self.path, ())
        if found.shape is not None and not (virtual or external):
            what = f"{name!r} of shape {found.shape}"
            check_announced(self.path, what, _bytes(found, found.shape), self.size)
            if found.chunks is not None:
                what = f"a chunk of {name!r}, {found.chunks}"
                check_announced(self.path, what, _bytes(found, found.chunks), self.size)


@contextmanager
def opened(path: Path, follow: bool | None = None) -> Iterator[Contents]:
    """Opens a file for reading, and words what goes wrong there or while it is read.

    Args:
        path: the file.
        follow: whether it may read other files; None: as `applications.inputs.links_followed` says.

    Yields:
        What it holds.

    Raises:
        InputError: if it is missing, not HDF5, or damaged.
    """
    size = checked_size(path, "an HDF5 file")
    found = path.stat()
    fate = _fate(path.absolute(), (found.st_dev, found.st_ino, found.st_mtime_ns, size))
    if fate is not None:
        raise InputError(
            f"{path}: {_WHAT} was needed, this one is damaged and leads HDF5 to {fate}; copy or "
            "download it again."
        )
    follow = links_followed() if follow is None else follow
    with reading(path, _WHAT), _locks(path), h5py.File(path, "r") as file:
        yield Contents(file, path, size, follow)


@lru_cache(maxsize=_REMEMBERED)
def _fate(path: Path, state: tuple[int, ...]) -> str | None:  # noqa: ARG001  the key of the cache
    """What HDF5 comes to over a file, tried once in a process of its own; None: to an end."""
    return survives(lambda: _touch(path), _SECONDS)


def _touch(path: Path) -> None:
    """Reads what there is in a file, up to a bound, and nothing of other files."""
    with h5py.File(path, "r") as file:
        waiting, seen, left = [file.id], 0, _TOUCHED
        while waiting and seen < _MOST_OBJECTS:
            one: Any = h5py.Group(waiting.pop())
            seen += 1
            left -= _touch_attributes(one)
            for key in list(one.id)[:_MOST_OBJECTS]:
                if one.id.links.get_info(key).type != _HARD:
                    continue
                with suppress(Exception):
                    inner = one[key]
                    if isinstance(inner, h5py.Group):
                        waiting.append(inner.id)
                    elif isinstance(inner, h5py.Dataset):
                        left -= _touch_attributes(inner) + _touch_values(inner, left)


def _touch_attributes(one: Any) -> int:
    for name in list(one.attrs)[:_MOST_OBJECTS]:
        with suppress(Exception):
            one.attrs[name]
    return len(one.attrs)


def _touch_values(one: h5py.Dataset, left: int) -> int:
    """Reads what is in the file itself: all, or the first and the last of what is large."""
    made, shape = one.id.get_create_plist(), one.shape
    if made.get_layout() == _VIRTUAL or made.get_external_count() or shape is None:
        return 0
    n_bytes = _bytes(one, shape)
    if one.chunks is not None and _bytes(one, one.chunks) > _TOUCHED:
        return 0
    parts: list[Any] = [()] if n_bytes <= left else [0, -1]
    if n_bytes > left and (not shape or n_bytes // max(shape[0], 1) > left):
        return 0
    for part in parts:
        for field_ in (None, *(one.dtype.names or ())):
            with suppress(Exception):
                _ = (one if field_ is None else one.fields(field_))[part]
    return min(n_bytes, max(left, 0))


@contextmanager
def _locks(path: Path) -> Iterator[None]:
    """Tells a file that another program writes from one that is damaged."""
    try:
        yield
    except OSError as error:
        if not any(sign in str(error) for sign in _LOCKED):
            raise
        raise InputError(
            f"{path}: another program has the file open for writing, it is locked; close it there "
            f"({said(error)})."
        ) from error


def _check_sources(found: h5py.Dataset, path: Path, above: tuple[tuple[Path, str], ...]) -> None:
    """Refuses a virtual dataset that is made of itself, at which HDF5 ends the process."""
    here = (path.resolve(), str(found.name))
    if here in above or len(above) > _DEEPEST:
        raise InputError(
            f"{path}: {_name(found)!r} is a virtual dataset made of itself; export it again."
        )
    for other, name in {(one.file_name, one.dset_name) for one in found.virtual_sources()}:
        place = path if other == "." else path.parent / other
        if "%" in other + name or not place.is_file():
            raise InputError(
                f"{path}: the file {other!r} of the virtual dataset {_name(found)!r} was needed, "
                "there is none; copy it."
            )
        with h5py.File(place, "r") as file:
            source: Any = file.get(name)
            if isinstance(source, h5py.Dataset) and source.is_virtual:
                _check_sources(source, place, (*above, here))


def _bytes(found: h5py.Dataset, shape: tuple[int, ...]) -> int:
    n = found.dtype.itemsize
    for side in shape:
        n *= int(side)
    return n


def _name(found: h5py.Dataset) -> str:
    return str(found.name).lstrip("/")


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
