"""Scans of several repetitions as M4Raw publishes them: the layout of fastMRI, a file a repetition.

The files of one scan lie in one folder and end in the number of the repetition, from 01:
``2022061003_T201.h5``, ``2022061003_T202.h5``, ... The path of the scan is what they have in
common, ``2022061003_T2``, and its volumes are the repetitions in order. A file of its own is a scan
of one volume. Columns that were never measured are zeros, without a mask.

Lyu et al. 2023, M4Raw, DOI 10.1038/s41597-023-02181-4.
"""

import re
from pathlib import Path

from applications.errors import InputError
from applications.mri.formats.base import Format, Reader
from applications.mri.formats.fastmri import FastMRIVolume


def repetitions(path: Path) -> tuple[Path, ...]:
    """The files of a scan in order.

    Args:
        path: what their names have in common; a path, not a pattern.

    Returns:
        The files; none if the path is a file itself.
    """
    if path.exists() or not path.parent.is_dir():
        return ()
    name = re.compile(re.escape(path.name) + r"\d\d\.h5")
    return tuple(sorted(one for one in path.parent.iterdir() if name.fullmatch(one.name)))


def _volumes(path: Path) -> tuple[Reader, ...]:
    files = repetitions(path)
    missing = {f"{path.name}{k:02}.h5" for k in range(1, len(files) + 1)} - {f.name for f in files}
    if missing:
        raise InputError(
            f"{path}: the repetitions must be numbered from 01 without gaps, "
            f"{', '.join(sorted(missing))} is missing; copy it, or read the files one by one."
        )
    volumes = tuple(FastMRIVolume(file) for file in files)
    first = volumes[0].facts
    for other in volumes[1:]:
        facts = other.facts
        if (facts.n_slices, facts.n_coils, facts.shape) != (
            first.n_slices,
            first.n_coils,
            first.shape,
        ):
            raise InputError(
                f"{other.path}: a repetition must have {first.n_slices} slices of {first.n_coils} "
                f"coils and {first.shape} positions as the first has, got {facts.n_slices} of "
                f"{facts.n_coils} and {facts.shape}; read the files one by one."
            )
    return volumes


FORMAT = Format(
    "M4Raw (the common part of the names of its .h5 files)",
    lambda path: bool(repetitions(path)),
    _volumes,
)
