"""Siemens raw data (TWIX, `meas.dat`): Cartesian 2-D scans; see `acquired`.

Blocks are read by twixtools, after their places in the file have been checked; its own parser of
whole files trusts them. Of a file of several measurements the last one is the scan; the scans of
noise are those of all. Slices and directions are as siemens_to_ismrmrd writes them.
"""

import ctypes
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.inputs import checked_size, reading
from applications.mri.formats.acquired import acquired_volumes
from applications.mri.formats.base import Acquisitions, Format, Reader, optional
from applications.mri.formats.encoding import Encoding
from applications.mri.formats.lines import HEAD

_PACKAGE = "twixtools"
_OVERSAMPLING = 2.0  # of the readout, where the protocol states none
_EMBEDDED = {2, 16, 32, 64}  # modes of the reference lines: in place, or interleaved
# Flags of TWIX, and the bits of ISMRMRD that mean the same.
_FLAGS = {
    "NOISEADJSCAN": 19,
    "PATREFSCAN": 20,
    "PATREFANDIMASCAN": 21,
    "REFLECT": 22,
    "SYNCDATA": 23,
    "PHASCOR": 24,
    "HPFEEDBACK": 26,
    "RTFEEDBACK": 28,
    "RETRO_DUMMYSCAN": 27,
    "SLICE_ACCEL_PHASCOR": 24,
    "REFPHASESTABSCAN": 30,
    "PHASESTABSCAN": 31,
}
_LEAST = 128  # bytes
_MOST_HEADER, _MOST_PARTS = 2**25, 64  # bytes; parts of it, such as the protocol
_MOST_SAMPLES = 2**16  # of a line, and lines
_LARGEST = 1e9  # number of a protocol
_SLICE = "sSliceArray.asSlice[0]"
_FACTOR = re.compile(
    r'<ParamDouble\."flReadoutOSFactor">\s*{\s*(?:<Precision>\s*\d+\s)?\s*(\d+(?:\.\d*)?)'
)
_ENTRY = np.dtype([("ids", "<u8"), ("begin", "<u8"), ("n_bytes", "<u8"), ("names", "V128")])
_VERSIONS = (10_000, 64)  # of VD and VE: first number below, number of measurements at most


@dataclass(frozen=True, eq=False)
class TwixAcquisitions(Acquisitions):
    """The acquisitions of a file.

    Attributes:
        path: the file.
        offsets: of each in the file [bytes].
        modern: whether the file is of VD or later.
    """

    path: Path
    offsets: tuple[int, ...]
    modern: bool

    def values(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:  # noqa: D102
        block = optional(f"{_PACKAGE}.mdb", self.path).Mdb
        with self.path.open("rb") as file:
            for number in numbers:
                file.seek(self.offsets[number])
                data = np.ascontiguousarray(block(file, self.modern).data, np.complex64)
                yield data.reshape(-1).view(np.float32)


@dataclass(frozen=True, eq=False)
class _Measurement:
    """The parts of its header that are read, by name, and its blocks."""

    texts: dict[str, str]
    blocks: list[Any]


def _volumes(path: Path) -> tuple[Reader, ...]:
    scans = _parsed(path)
    if not scans:
        raise InputError(f"{path}: a measurement was needed, the file has none; copy it again.")
    blocks = [one for scan in scans[:-1] for one in scan.blocks if one.is_flag_set("NOISEADJSCAN")]
    blocks += [one for one in scans[-1].blocks if not one.is_flag_set("ACQEND")]
    heads = np.zeros(len(blocks), HEAD)
    for head, block in zip(heads, blocks, strict=True):
        _fill(head, block)
    usable = ~_unreadable(heads)
    if not usable.any():
        raise InputError(
            f"{path}: lines of an image were needed, the file has none; copy it again."
        )
    heads, blocks = heads[usable], [b for b, good in zip(blocks, usable, strict=True) if good]
    acquisitions = TwixAcquisitions(
        path, tuple(int(one.mem_pos) for one in blocks), _is_modern(path)
    )
    centres = [one.mdh.CenterLin for one in blocks if one.is_image_scan()]
    encoding = _encoding(scans[-1].texts, heads, int(np.median(centres or [0])), path)
    return acquired_volumes(acquisitions, heads, encoding)


def _parsed(path: Path) -> list[_Measurement]:
    """All measurements of a file, complete."""
    optional(_PACKAGE, path)
    size = checked_size(path, "a TWIX file")
    scans = []
    with reading(path, "a complete TWIX file", "copy or export it again"), path.open("rb") as file:
        modern = _is_modern(path)
        ends = [(0, size)]
        if modern:
            n = int(np.frombuffer(file.read(8), "<u4")[1])
            entries = np.frombuffer(file.read(n * _ENTRY.itemsize), _ENTRY)
            ends = [
                (int(one["begin"]), int(one["begin"]) + int(one["n_bytes"] or size))
                for one in entries
            ]
        for begin, end in ends:
            scans.append(_measurement(path, file, (begin, min(end, size)), modern))
    return scans


def _measurement(path: Path, file: BinaryIO, place: tuple[int, int], modern: bool) -> _Measurement:
    """A measurement, each block of which lies in the file, and behind the one before."""
    begin, end = place
    header, texts = _texts(file, begin, end)
    block, layout = optional(f"{_PACKAGE}.mdb", path).Mdb, optional(f"{_PACKAGE}.mdh_def", path)
    head = layout.Scan_header if modern else layout.VB17_header
    least, position = ctypes.sizeof(head), begin + header
    blocks = []
    complete = False
    while position + least <= end and not complete:
        file.seek(position)
        mdh = head.from_buffer_copy(file.read(least))
        complete = layout.is_flag_set(mdh, "ACQEND")
        apart = complete or layout.is_flag_set(mdh, "SYNCDATA")
        channel = ctypes.sizeof(layout.Channel_header) if modern else least
        n_bytes = int(mdh.UsedChannels) * (channel + 8 * int(mdh.SamplesInScan)) + modern * least
        n_bytes = int(layout.get_dma_len(mdh)) if apart else n_bytes
        # A block of no length would be read for ever.
        if n_bytes < least or (position + n_bytes > end and not complete):
            break
        file.seek(position)
        blocks.append(block(file, modern))
        position += n_bytes
    if not complete or "MeasYaps" not in texts:
        raise InputError(
            f"{path}: a complete TWIX file was needed, the end of the measurement is missing; "
            "copy or export it again."
        )
    return _Measurement(texts, blocks)


def _texts(file: BinaryIO, begin: int, end: int) -> tuple[int, dict[str, str]]:
    """The length of the header of a measurement, and the parts of it that are read."""
    file.seek(begin)
    length, n = (int(one) for one in np.frombuffer(file.read(8), "<u4"))
    if not 8 <= length <= min(end - begin, _MOST_HEADER):
        raise ValueError(f"its header has {length} bytes, of {end - begin}")
    header = file.read(length - 8)
    found, position = {}, 0
    for _ in range(min(n, _MOST_PARTS)):
        part = re.compile(rb"(\w{4,})\0(.{4})", re.DOTALL).search(header, position, position + 48)
        if part is None:
            break
        begin, size = part.end(), int.from_bytes(part[2], "little")
        if part[1] in {b"MeasYaps", b"Dicom"}:
            found[part[1].decode()] = header[begin : begin + size].decode("latin1")
        position = begin + size
    return length, found


def _stated(text: str, name: str) -> str | None:
    """A value of the protocol as it is written, without quotes; None where it is not."""
    found = re.search(rf"^{re.escape(name)}[ \t]*=[ \t]*(\S*)", text, re.MULTILINE)
    return None if found is None else found[1].strip('"')


def _number(text: str, name: str, default: float, path: Path) -> float:
    """A number of the protocol."""
    stated = _stated(text, name)
    try:
        value = default if stated is None else float(_as_number(stated))
    except ValueError:
        value = math.nan
    if not abs(value) < _LARGEST:
        raise InputError(
            f"{path}: {name} of the protocol must be a number, got {(stated or '')[:80]!r}; export "
            "the scan again."
        )
    return value


def _as_number(stated: str) -> str | int:
    return int(stated, 16) if stated.lower().startswith("0x") else stated


def _fill(head: Any, block: Any) -> None:
    """A head of `lines.HEAD` from a block of measurement data."""
    mdh, counter = block.mdh, block.mdh.Counter
    head["flags"] = sum({1 << (bit - 1) for name, bit in _FLAGS.items() if block.is_flag_set(name)})
    head["number_of_samples"], head["active_channels"] = mdh.SamplesInScan, mdh.UsedChannels
    head["discard_pre"], head["discard_post"] = mdh.CutOff.Pre, mdh.CutOff.Post
    head["center_sample"] = mdh.CenterCol
    place = mdh.SliceData.SlicePos
    head["position"] = place.Sag, place.Cor, place.Tra
    d, a, b, c = (float(one) for one in mdh.SliceData.Quaternion)
    if a or b or c or d:
        head["read_dir"] = 2 * (a * b - c * d), 1 - 2 * (a * a + c * c), 2 * (b * c + a * d)
        head["phase_dir"] = 1 - 2 * (b * b + c * c), 2 * (a * b + c * d), 2 * (a * c - b * d)
        head["slice_dir"] = 2 * (a * c + b * d), 2 * (b * c - a * d), 1 - 2 * (a * a + b * b)
    index = head["idx"]
    index["kspace_encode_step_1"], index["kspace_encode_step_2"] = counter.Lin, counter.Par
    index["average"], index["slice"], index["contrast"] = counter.Ave, counter.Sli, counter.Eco
    index["phase"], index["repetition"], index["set"] = counter.Phs, counter.Rep, counter.Set


def _unreadable(heads: NDArray[Any]) -> NDArray[np.bool_]:
    """Blocks that hold no samples of coils: synchronous data, of the heart beat for example."""
    return (heads["flags"] & np.uint64(1 << (23 - 1))) != 0


def _encoding(texts: dict[str, str], heads: NDArray[Any], centre: int, path: Path) -> Encoding:
    """The sizes of the scan by its protocol."""
    protocol = texts["MeasYaps"]

    def number(name: str, default: float = 0.0) -> float:
        return _number(protocol, name, default, path)

    if number("sKSpace.ucTrajectory", 1) != 1:
        raise InputError(
            f"{path}: the trajectory must be cartesian, it is not; grid the scan first."
        )
    if number("sKSpace.ucDimension", 2) == 4:
        raise InputError(
            f"{path}: a 2-D scan was needed, the protocol is of three dimensions; transform 3-D "
            "scans along one axis and store them as slices."
        )
    n_rows = int(number("sKSpace.lBaseResolution"))
    width, height = (number(f"{_SLICE}.{name}") for name in ("dReadoutFOV", "dPhaseFOV"))
    if n_rows < 1 or min(width, height) <= 0:
        raise InputError(
            f"{path}: the protocol must state matrix size and field of view, got "
            f"{n_rows} and {width:g} x {height:g} mm; export the scan again."
        )
    factor = _FACTOR.search(texts.get("Dicom", ""))
    factor = float(factor[1]) if factor else 0.0
    wider = 1 + number("sKSpace.dPhaseOversamplingForDialog")
    last = int(heads["idx"]["kspace_encode_step_1"].max())
    stated = round(int(number("sKSpace.lPhaseEncodingLines")) * wider)
    n_lines = max(stated, 2 * centre, 2 * (last - centre) + 1)
    encoded = round(n_rows * (factor or _OVERSAMPLING)), n_lines
    if not n_rows <= encoded[0] < _MOST_SAMPLES or not wider >= 1 or n_lines >= _MOST_SAMPLES:
        raise InputError(
            f"{path}: the protocol must state oversampling of at least 1 and sizes below "
            f"{_MOST_SAMPLES}, got {encoded[0]} of {n_rows} samples and {n_lines} lines, {wider:g} "
            "times as wide; export the scan again."
        )
    return Encoding(
        encoded,
        n_rows,
        max(round(n_lines / wider), 1),
        centre,
        (width / n_rows, height * wider / n_lines, number(f"{_SLICE}.dThickness", 1)),
        number("sPat.ucRefScanMode", 1) in _EMBEDDED,
        _stated(protocol, "tProtocolName") or "unknown",
    )


def _is_modern(path: Path) -> bool:
    """Whether a file is of VD or VE, by the rule of twixtools."""
    first, second = np.fromfile(path, "<u4", count=2)
    return bool(first < _VERSIONS[0] and second <= _VERSIONS[1])


def _recognises(path: Path) -> bool:
    """By what the header of a measurement begins with: its length, a count, and a name."""
    if not path.is_file() or path.stat().st_size < _LEAST:
        return False
    with path.open("rb") as file:
        start = np.frombuffer(file.read(24), "<u8")
        begin = int(start[2]) if _is_modern(path) else 0
        file.seek(min(begin, path.stat().st_size))
        header = file.read(64)
    return len(header) == 64 and header[8:].startswith((b"Config\0", b"Dicom\0", b"Meas\0"))


FORMAT = Format("Siemens TWIX (.dat)", _recognises, _volumes)
