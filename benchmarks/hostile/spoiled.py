"""Bytes and words of a file, changed at random."""

import re
from collections.abc import Callable
from pathlib import Path

from numpy.random import Generator

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_WORDS = (
    *(b"nan", b"inf", b"-inf", b"1e308", b"-1", b"0", b"1e-320", b"9" * 30, b"9" * 5000, b""),
    *(b"x", b"null", b"true", b"[]", b"{}", b'"', b"\xff\xfe", b"\x00", b"&a", b"*a", b"<<: 1"),
    *(b"[" * 3000, b"- " * 3000, b"]", b"<a>" * 500, b"!!python/name:os.system", b"2001-99-99"),
)
_NEAR = 4096  # bytes at the beginning, where headers are


def spoil(folder: Path, path: Path, rng: Generator) -> None:
    """Changes one or two of the files in a folder.

    Args:
        folder: of the files.
        path: the file that is read, changed most often.
        rng: of what is changed.
    """
    files = sorted(one for one in folder.iterdir() if one.is_file())
    for _ in range(1 + (rng.random() < 0.2)):
        chosen = path if path in files and rng.random() < 0.7 else files[rng.integers(len(files))]
        content = chosen.read_bytes()
        for _ in range(1 if rng.random() < 0.7 else rng.integers(2, 5)):
            content = _CHANGES[rng.integers(len(_CHANGES))](content, rng)
        chosen.write_bytes(content)


def _place(content: bytes, rng: Generator) -> int:
    reach = len(content) if rng.random() < 0.5 else min(len(content), _NEAR)
    return int(rng.integers(reach + 1))


def _flip(content: bytes, rng: Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if changed:
            place = min(_place(content, rng), len(changed) - 1)
            changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _number(content: bytes, rng: Generator) -> bytes:
    place, n = _place(content, rng), [1, 2, 4, 8][rng.integers(4)]
    value = _NUMBERS[rng.integers(len(_NUMBERS))] % 2 ** (8 * n)
    written = value.to_bytes(n, ["little", "big"][rng.integers(2)])
    return content[:place] + written + content[place + n :]


def _cut(content: bytes, rng: Generator) -> bytes:
    return content[: _place(content, rng)]


def _remove(content: bytes, rng: Generator) -> bytes:
    place = _place(content, rng)
    return content[:place] + content[place + int(rng.integers(1, 64)) :]


def _repeat(content: bytes, rng: Generator) -> bytes:
    place = _place(content, rng)
    piece = content[place : place + int(rng.integers(1, 512))]
    return content[:place] + piece * int(rng.integers(1, 5)) + content[place:]


def _random(content: bytes, rng: Generator) -> bytes:
    place, n = _place(content, rng), int(rng.integers(1, 32))
    return content[:place] + rng.bytes(n) + content[place + n :]


def _word(content: bytes, rng: Generator) -> bytes:
    """A number or a name of a text, replaced by something else."""
    found = [one.span() for one in re.finditer(rb"[-+.\w]+", content[: 4 * _NEAR])]
    if not found:
        return content
    begin, end = found[rng.integers(len(found))]
    return content[:begin] + _WORDS[rng.integers(len(_WORDS))] + content[end:]


_CHANGES: tuple[Callable[[bytes, Generator], bytes], ...] = (
    *(_flip, _number, _number, _cut, _remove, _repeat, _random, _word, _word),
)
