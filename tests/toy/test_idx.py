import gzip
import re
import struct

import numpy as np
import pytest

from applications.errors import InputError
from applications.toy.idx import read_idx

IMAGES = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def encoded(values, kind=0x08):
    return (
        bytes([0, 0, kind, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + (values.tobytes())
    )


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_an_array_is_read_as_it_was_written_packed_or_not(tmp_path, pack):
    (tmp_path / "file").write_bytes(pack(encoded(IMAGES)))
    found = read_idx(tmp_path / "file", 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, IMAGES)


BAD = {
    "text": (b"hello", "an IDX file was needed, .*; it begins with 68 65 6c 6c. Check which"),
    "empty": (b"", "an IDX file was needed, .*; it begins with nothing. Check which"),
    "type": (encoded(IMAGES, 0x0D), r"type uint8 \(0x08\) were needed, got float32 \(0x0d\); conv"),
    "unknown": (encoded(IMAGES, 0x77), r"were needed, got an unknown type \(0x77\); convert"),
    "axes": (encoded(IMAGES[0, 0]), "images were needed, with 3 axes, the file has 1; are the"),
    "header": (encoded(IMAGES)[:10], "a header of 16 bytes was needed, the file has 10; copy"),
    "short": (
        encoded(IMAGES)[:-1],
        r"18 values were needed for shape \(2, 3, 3\), .* has 17; copy",
    ),
    "long": (encoded(IMAGES) + b"\0", r"18 values were needed for shape .*, the file has 19; copy"),
    "gzip": (
        gzip.compress(encoded(IMAGES))[:-12],
        r"a complete gzip file was needed, it cannot be read \(.*\); copy or download it again",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_array_of_bytes_is_refused(tmp_path, content, message):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(InputError, match=f"bad: .*{message}"):
        read_idx(tmp_path / "bad", 3)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"none: an IDX file was needed, there is no such file; check"
    ):
        read_idx(tmp_path / "none", 1)
    with pytest.raises(
        InputError,
        match=rf"{re.escape(str(tmp_path))}: an IDX .*, there is no such file but a folder",
    ):
        read_idx(tmp_path, 1)
