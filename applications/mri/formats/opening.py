"""Opens a scan by what it is: the list of the formats."""

from pathlib import Path

from applications.errors import InputError
from applications.mri.formats import cfl, fastmri, ismrmrd, m4raw
from applications.mri.formats.base import Reader
from applications.mri.formats.nifti import is_nifti

# A format that recognises less stands before one that recognises more.
FORMATS = (m4raw.FORMAT, cfl.FORMAT, ismrmrd.FORMAT, fastmri.FORMAT)


def open_volumes(path: Path) -> tuple[Reader, ...]:
    """All volumes of a scan, in the format that recognises it.

    Args:
        path: file, or what the files of a scan have in common.

    Returns:
        One reader a volume, at least one.

    Raises:
        InputError: if no format recognises the path, or the file is bad.
    """
    for one in FORMATS:
        if one.recognises(path):
            return one.volumes(path)
    if is_nifti(path):
        raise InputError(
            f"{path}: k-space was needed, NIfTI holds images; simulate a scan of them with "
            "simulate --anatomies."
        )
    there = "is none of them" if path.exists() else "does not exist"
    raise InputError(
        f"{path}: a scan was needed, one of {', '.join(one.name for one in FORMATS)}; this {there}."
    )
