"""Where the bundled files lie."""

from importlib import resources
from pathlib import Path


def bundled(name: str) -> Path:
    """Path of a file that comes with the package.

    Args:
        name: of the file.

    Returns:
        Its path.
    """
    return Path(str(resources.files("applications.mri.bundled") / name))


def bundled_scan_path() -> Path:
    """Path of the bundled measured scan.

    Returns:
        A file of one brain slice, 8 coils, 230 x 180, undersampled 8-fold, without reference.
    """
    return bundled("real_brain_8coil_poisson_r8.h5")
