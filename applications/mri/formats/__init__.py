"""File formats of scans and images, each in a file of its own."""

from applications.mri.formats.base import Facts, Format, Geometry, RawSlice, Reader
from applications.mri.formats.opening import FORMATS, open_volumes

__all__ = ["FORMATS", "Facts", "Format", "Geometry", "RawSlice", "Reader", "open_volumes"]
