"""Scans: read slice by slice, in any format, and written in the layout of fastMRI."""

from applications.mri.data.reading import (
    Slice,
    SliceDataset,
    VolumeFile,
    fully_sampled,
    implied_mask,
    open_scan,
)
from applications.mri.data.writing import Volume, write_volume

__all__ = [
    "Slice",
    "SliceDataset",
    "Volume",
    "VolumeFile",
    "fully_sampled",
    "implied_mask",
    "open_scan",
    "write_volume",
]
