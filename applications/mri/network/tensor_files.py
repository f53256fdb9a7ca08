"""Files of tensors: safetensors, the same bytes for the same content, their headers read first."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from applications.errors import InputError
from applications.files import write_whole
from applications.inputs import checked_size, reading, said

_MOST_HEADER = 2**26  # bytes
_ALIGNED = 8  # bytes


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file that either is complete or does not appear.

    Args:
        path: the file, replaced if it exists.
        tensors: by name, of which no two share memory.
        metadata: texts by name.

    Raises:
        InputError: if the file cannot be written.
    """
    content = save(dict(tensors), dict(metadata))
    # The package writes metadata in an order that changes from one process to the next.
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:begin]), sort_keys=True, separators=(",", ":"))
    packed = header.encode()
    packed += b" " * (-len(packed) % _ALIGNED)
    write_whole(path, len(packed).to_bytes(8, "little") + packed + content[begin:])


def read_metadata(path: Path, what: str, remedy: str) -> dict[str, str]:
    """The texts of a file, without its tensors.

    Args:
        path: the file.
        what: was needed, with its article.
        remedy: what to do where it is damaged.

    Returns:
        By name.

    Raises:
        InputError: if the file is missing or damaged.
    """
    _check_header(path, what, remedy)
    with reading(path, what, remedy), _opened(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path, what: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        path: the file.
        what: was needed, with its article.
        remedy: what to do where it is damaged.

    Returns:
        By name.

    Raises:
        InputError: if the file is missing or damaged.
    """
    _check_header(path, what, remedy)
    with reading(path, what, remedy), _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_json(path: Path, key: str, text: str, remedy: str) -> Any:
    """A text of the metadata as what it says in JSON.

    Args:
        path: the file, for messages.
        key: of the text, for messages.
        text: in JSON.
        remedy: what to do where it is not.

    Returns:
        Plain values.

    Raises:
        InputError: if it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: metadata {key!r} must be JSON, it is not ({said(error)}); {remedy}."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, by a name that the package takes: one in UTF-8."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        with TemporaryDirectory(prefix="bilevel-") as folder:
            link = Path(folder) / "file"
            link.symlink_to(path.absolute())
            with safe_open(link, framework="pt") as file:
                yield file
        return
    with safe_open(path, framework="pt") as file:
        yield file


def _check_header(path: Path, what: str, remedy: str) -> None:
    size = checked_size(path, what)
    with reading(path, what, remedy), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise ValueError(f"a header of {length} bytes is announced, in a file of {size}")
