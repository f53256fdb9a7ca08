"""File formats of scans and images, each in a file of its own.

Read `base`, `hdf5`, `cfl`, `fastmri`, `m4raw`, `ismrmrd_header`, `ismrmrd_lines`, `ismrmrd`,
`nifti`.
"""

from applications.mri.formats.base import Facts, Format, Geometry, RawSlice, Reader

__all__ = ["Facts", "Format", "Geometry", "RawSlice", "Reader"]
