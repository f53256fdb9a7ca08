"""File formats of scans and images, each in a file of its own.

Read `base`, `hdf5`, `cfl`, `fastmri_header`, `fastmri`, `m4raw`; `encoding`, `lines`, `noise`,
`acquired` of raw data, with `ismrmrd_header`, `ismrmrd` and `twix`; `nifti`.
"""

from applications.mri.formats.base import (
    Facts,
    Format,
    Geometry,
    RawSlice,
    Reader,
    UnusableSliceError,
)

__all__ = ["Facts", "Format", "Geometry", "RawSlice", "Reader", "UnusableSliceError"]
