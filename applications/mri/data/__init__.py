"""Scans: read slice by slice, in any format, and written in the layout of fastMRI.

Read `centre`, `values`, `volumes`, `remarks`, `slices`, `writing`, `coil_fits`, `images`.
"""

from applications.mri.data.slices import SliceDataset, examined, fully_sampled, scans_in
from applications.mri.data.values import Slice, UnusableSliceError, implied_mask
from applications.mri.data.volumes import FORMATS, VolumeFile, open_scan, open_volumes
from applications.mri.data.writing import Volume, write_volume

__all__ = [
    "FORMATS",
    "Slice",
    "SliceDataset",
    "UnusableSliceError",
    "Volume",
    "VolumeFile",
    "examined",
    "fully_sampled",
    "implied_mask",
    "open_scan",
    "open_volumes",
    "scans_in",
    "write_volume",
]
