"""Files in the IDX format, in which MNIST and its relatives are distributed.

Two zero bytes, a byte for the type of the values, a byte for the number of axes, the length of each
axis as a big-endian 32-bit number, and then the values, the last axis running fastest.
"""

import math
from pathlib import Path

import numpy as np

from applications.errors import InputError
from applications.inputs import check_announced, content as content_of, unpacked

# Type byte and NumPy type of what this application reads: pixels and labels are bytes.
_TYPES = {0x08: np.dtype(np.uint8)}
_NAMES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_GZIP = "a complete gzip file"
_MOST_BYTES = 2**31  # of a file, packed or not


def read_idx(path: Path, n_axes: int) -> np.ndarray:
    """The array of an IDX file of bytes, plain or compressed by gzip (told from its content).

    Args:
        path: the file.
        n_axes: that it must have: 3 for images, 1 for labels.

    Returns:
        uint8, with `n_axes` axes.

    Raises:
        InputError: if there is no such file, or it is no IDX file of bytes with `n_axes` axes, or
            it has fewer or more values than its header says.
    """
    packed = content_of(path, "an IDX file", _MOST_BYTES)
    begin = 4 + 4 * n_axes
    content = unpacked(path, packed, _GZIP, begin)[:begin]
    if len(content) < 4 or content[:2] != b"\0\0" or content[3] == 0:
        raise InputError(
            f"{path}: an IDX file was needed, beginning with 00 00, a type and the number of axes; "
            f"it begins with {content[:4].hex(' ') or 'nothing'}. Check which file this is."
        )
    kind, found = content[2], content[3]
    if kind not in _TYPES:
        raise InputError(
            f"{path}: values of type uint8 (0x08) were needed, got "
            f"{_NAMES.get(kind, 'an unknown type')} (0x{kind:02x}); convert them to 0 to 255."
        )
    if found != n_axes:
        raise InputError(
            f"{path}: {_expected(n_axes)} were needed, with {n_axes} axes, the file has {found}; "
            "are the files of images and labels exchanged?"
        )
    if len(content) < begin:
        raise InputError(
            f"{path}: a header of {begin} bytes was needed, the file has {len(content)}; "
            "copy or download it again."
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", n_axes, 4))
    check_announced(path, f"an array of shape {shape}", math.prod(shape), len(packed))
    content = unpacked(path, packed, _GZIP, begin + math.prod(shape) + 1)
    values = len(content) - begin
    if values != math.prod(shape):
        raise InputError(
            f"{path}: {math.prod(shape)} values were needed for shape {shape}, the file has "
            f"{values}; copy or download it again."
        )
    return np.frombuffer(content, _TYPES[kind], offset=begin).reshape(shape)


def _expected(n_axes: int) -> str:
    return {1: "labels", 3: "images"}.get(n_axes, "values")
