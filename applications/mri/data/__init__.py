"""Scans: read slice by slice, in any format, and written in the layout of fastMRI.

Read `volumes`, `slices`, `writing`, `coil_fits`, `images`.
"""

from applications.mri.data.slices import SliceDataset, fully_sampled, implied_mask
from applications.mri.data.volumes import FORMATS, Slice, VolumeFile, open_scan, open_volumes
from applications.mri.data.writing import Volume, write_volume

__all__ = [
    "FORMATS",
    "Slice",
    "SliceDataset",
    "Volume",
    "VolumeFile",
    "fully_sampled",
    "implied_mask",
    "open_scan",
    "open_volumes",
    "write_volume",
]
