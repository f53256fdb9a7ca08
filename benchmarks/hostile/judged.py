"""What becomes of a file: refused in one line that names it, or accepted with sound numbers."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import fully_sampled, open_scan
from applications.mri.data.values import Slice
from applications.mri.meta.transfer import learned_correlation
from applications.mri.network.weights import load_weights, named
from applications.mri.sampling import FromFile
from applications.mri.simulation.anatomy import load_anatomies, wraps
from applications.mri.tasks.task_list import read_task_list
from applications.toy.data import load as load_idx
from benchmarks.hostile.valid import kept_run
from bilevel.errors import BilevelError

REFUSED, ACCEPTED = "refused", "accepted"
_FEW = 3  # volumes and slices that are read
_LONGEST = 2500  # characters of a message


class WrongError(Exception):
    """A file was accepted whose numbers cannot be right, or refused without its name."""


def judged(kind: str, path: Path) -> str:
    """Reads a file.

    Args:
        kind: as in `valid.KINDS`.
        path: the file.

    Returns:
        `REFUSED` or `ACCEPTED`; everything else is an error.

    Raises:
        WrongError: if a number is not sound, or the message does not name the file.
    """
    try:
        READERS[kind](path)
    except BilevelError as error:
        message = str(error)
        names = {path.name, path.stem, path.parent.name}
        if not any(name in message for name in names) or len(message) > _LONGEST:
            raise WrongError(f"message without the file, or too long: {message[:300]}") from error
        return REFUSED
    return ACCEPTED


def check(sound: bool, what: str) -> None:
    if not sound:
        raise WrongError(what)


def _finite(values: Tensor, what: str) -> None:
    check(bool(torch.isfinite(values).all()), f"{what} is not finite")


def _scan(path: Path) -> None:
    for volume in open_scan(path)[:_FEW]:
        facts = volume.facts
        check(1 <= facts.n_slices <= 10_000 and 1 <= facts.n_coils <= 1024, "counts")
        check(facts.max is None or 0 <= facts.max < math.inf, f"max {facts.max}")
        if facts.geometry is not None:
            spacing, affine = facts.geometry.spacing, facts.geometry.affine
            check(all(0 <= one < math.inf for one in spacing), f"spacing {spacing}")
            check(all(map(math.isfinite, sum(affine or (), ()))), "affine")
        check(all(n >= 1 for n in volume.image_shape), f"image shape {volume.image_shape}")
        for index in range(min(volume.n_slices, _FEW)):
            try:
                one = volume.read_slice(index)
            except InputError:
                continue
            _slice(one, (facts.n_coils, *facts.shape))


def _slice(one: Slice, shape: tuple[int, ...]) -> None:
    check(tuple(one.kspace.shape) == shape, f"k-space {tuple(one.kspace.shape)} of {shape}")
    check(one.kspace.dtype == torch.complex64, f"k-space of {one.kspace.dtype}")
    _finite(torch.view_as_real(one.kspace), "k-space")
    check(bool(one.measured.any()), "nothing measured")
    check(math.isfinite(one.unit) and one.unit > 0, f"unit {one.unit}")
    if one.calibration is not None:
        _finite(torch.view_as_real(one.calibration), "calibration")
    try:
        kspace, reference = fully_sampled(one)
    except InputError:
        return
    _finite(reference, "reference")
    check(reference.ndim == 2 and kspace.ndim == 3, "axes")


def _images(path: Path) -> None:
    for name, images in load_anatomies(path).items():
        _finite(images, name)
        check(images.ndim == 3 and images.numel() > 0, f"{name} of shape {tuple(images.shape)}")
        check(0 <= float(images.min()) <= float(images.max()) <= 1, f"{name} outside of 0 to 1")
    wraps(path)


def _mask(path: Path) -> None:
    kept = FromFile(path)._kept
    check(kept.dtype == torch.bool and bool(kept.any()) and kept.ndim in {1, 2}, "mask")


def _tasks(path: Path) -> None:
    for one in read_task_list(path):
        try:
            sampling = one.sampling
        except InputError:
            continue
        check(isinstance(repr(sampling), str), "sampling")
        for name in ("noise", "target_noise", "local_phase", "size", "coils", "repeats"):
            value = getattr(one, name)
            check(0 <= value < 1e6, f"{name} {value}")


def _weights(path: Path) -> None:
    for name, value in named(load_weights(path).control).items():
        _finite(torch.view_as_real(value) if value.is_complex() else value, name)


def _state(path: Path) -> None:
    found = kept_run(path.parent, 3, resume=True)
    _finite(found.control, "control")


def _results(path: Path) -> None:
    for row in learned_correlation(path).values():
        check(all(0 <= one <= 1.01 for one in row.values()), f"correlation {row}")


def _idx(path: Path) -> None:
    found = load_idx(path.parent)
    _finite(found.inputs, "pixels")
    check(0 <= float(found.inputs.min()) <= float(found.inputs.max()) <= 1, "pixels")
    check(0 <= int(found.labels.min()) <= int(found.labels.max()) < found.n_classes, "labels")


READERS: dict[str, Callable[[Path], None]] = {
    **dict.fromkeys(("fastMRI", "M4Raw", "ISMRMRD", "BART", "TWIX"), _scan),
    "NIfTI": _images,
    "anatomies": _images,
    "mask": _mask,
    "YAML": _tasks,
    "weights": _weights,
    "state": _state,
    "results": _results,
    "IDX": _idx,
}
