"""Siemens raw data (TWIX, `meas.dat`): Cartesian 2-D scans; see `acquired`.

The file is parsed by twixtools. Of a file of several measurements the last one is the scan; the
scans of noise are those of all. Slices and directions are as siemens_to_ismrmrd writes them.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
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


def _volumes(path: Path) -> tuple[Reader, ...]:
    scans = _parsed(path)
    if not scans:
        raise InputError(f"{path}: a measurement was needed, the file has none; copy it again.")
    blocks = [one for scan in scans[:-1] for one in scan["mdb"] if one.is_flag_set("NOISEADJSCAN")]
    blocks += [one for one in scans[-1]["mdb"] if not one.is_flag_set("ACQEND")]
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
    encoding = _encoding(scans[-1]["hdr"], heads, int(np.median(centres or [0])), path)
    return acquired_volumes(acquisitions, heads, encoding)


def _parsed(path: Path) -> list[dict[str, Any]]:
    """All measurements of a file, complete."""
    package = optional(_PACKAGE, path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints its warnings
            scans = package.read_twix(
                str(path), parse_pmu=False, parse_geometry=False, verbose=False, keep_acqend=True
            )
    except Exception as error:  # of the package, whatever a damaged file leads to
        raise InputError(
            f"{path}: a complete TWIX file was needed, it cannot be read ({error}); copy or export "
            "it again."
        ) from error
    size = path.stat().st_size
    for scan in scans:
        last = scan["mdb"][-1] if scan["mdb"] else None
        ends = last is not None and last.is_flag_set("ACQEND")
        if last is None or not ends or int(last.mem_pos) >= size or "MeasYaps" not in scan["hdr"]:
            raise InputError(
                f"{path}: a complete TWIX file was needed, the end of the measurement is missing; "
                "copy or export it again."
            )
    return scans


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


def _encoding(header: Any, heads: NDArray[Any], centre: int, path: Path) -> Encoding:
    """The sizes of the scan by its protocol."""
    protocol = header["MeasYaps"]
    space, slices = protocol.get("sKSpace", {}), protocol.get("sSliceArray", {})
    if space.get("ucTrajectory", 1) != 1:
        raise InputError(
            f"{path}: the trajectory must be cartesian, it is not; grid the scan first."
        )
    if space.get("ucDimension", 2) == 4:
        raise InputError(
            f"{path}: a 2-D scan was needed, the protocol is of three dimensions; transform 3-D "
            "scans along one axis and store them as slices."
        )
    views = (slices.get("asSlice") or [{}])[0]
    n_rows = int(space.get("lBaseResolution", 0))
    width, height = (float(views.get(name, 0)) for name in ("dReadoutFOV", "dPhaseFOV"))
    if n_rows < 1 or min(width, height) <= 0:
        raise InputError(
            f"{path}: the protocol must state matrix size and field of view, got "
            f"{n_rows} and {width:g} x {height:g} mm; export the scan again."
        )
    factor = header.get("Dicom", {}).get("flReadoutOSFactor") or _OVERSAMPLING
    wider = 1 + float(space.get("dPhaseOversamplingForDialog", 0))
    last = int(heads["idx"]["kspace_encode_step_1"].max())
    stated = round(int(space.get("lPhaseEncodingLines", 0)) * wider)
    n_lines = max(stated, 2 * centre, 2 * (last - centre) + 1)
    mode = protocol.get("sPat", {}).get("ucRefScanMode", 1)
    return Encoding(
        (round(n_rows * float(factor)), n_lines),
        n_rows,
        max(round(n_lines / wider), 1),
        centre,
        (width / n_rows, height * wider / n_lines, float(views.get("dThickness", 1))),
        mode in _EMBEDDED,
        str(protocol.get("tProtocolName", "unknown")),
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
        file.seek(int(start[2]) if _is_modern(path) else 0)
        header = file.read(64)
    return len(header) == 64 and header[8:].startswith((b"Config\0", b"Dicom\0", b"Meas\0"))


FORMAT = Format("Siemens TWIX (.dat)", _recognises, _volumes)
