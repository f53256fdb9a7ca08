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
        A Siemens raw file of one slice of a phantom, 2 coils, 160 x 160, fully sampled; reading it
        needs twixtools.
    """
    return bundled("gre.dat")
