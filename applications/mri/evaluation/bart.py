"""BART's l1-wavelet with two ESPIRiT maps, where the program `bart` is installed.

Two maps take an object that wraps around once. BART is run as a program and gets its data in files;
Debian's package is `bart`. Uecker et al. 2014, ESPIRiT, DOI 10.1002/mrm.24751.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.physics.consistency import fully_sampled_centre
from applications.mri.physics.masks import check_mask

_AXES = 16
_CENTRE, _KERNEL = 24, 6  # positions, BART's defaults, where the centre is as large


def bart_installed() -> bool:
    """Whether the program is found."""
    return shutil.which("bart") is not None


def bart_l1_wavelet(kspace: Tensor, mask: Tensor, _maps: Tensor, lamda: float) -> Tensor:
    """`bart pics -l1` with two maps of `bart ecalib`, 60 iterations.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``, zeros where nothing was measured.
        mask: boolean, shape ``(rows, columns)``.
        lamda: regularisation, in the units that BART scales data to.

    Returns:
        Root sum of squares over the coil images of both maps, float32, shape ``(rows, columns)``.

    Raises:
        InputError: if BART is not installed, or fails.
    """
    check_mask(mask, (kspace.shape[1], kspace.shape[2]))
    if not bart_installed():
        raise InputError("bart was needed, it is not installed; on Debian, apt-get install bart.")
    top, bottom, left, right = fully_sampled_centre(mask)
    side = min(_CENTRE, bottom - top, right - left)
    with tempfile.TemporaryDirectory(prefix="bart-") as place:
        folder = Path(place)
        measured = (kspace * mask).cpu().numpy()
        _write(folder / "kspace", measured.transpose(1, 2, 0)[None])
        # The region that BART finds is even, and around the middle of the matrix.
        size = f"-r {side} -k {max(1, min(side - 2, _KERNEL))}"
        _run(folder, *f"ecalib -m2 -c0 {size} kspace maps".split())  # -c0: maps of the air, too
        _run(folder, *f"pics -S -l1 -r {lamda:g} -i 60 kspace maps image".split())
        maps, image = _read(folder / "maps"), _read(folder / "image")
    coil_images = (maps * image).sum(4)[0, ..., 0]  # (rows, columns, coils), both maps added
    return torch.from_numpy(np.sqrt((np.abs(coil_images) ** 2).sum(-1)).astype(np.float32))


def _run(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        ["bart", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(f"bart {arguments[0]} failed: {said[-1] if said else 'without a word'}.")


def _write(path: Path, values: NDArray[np.complexfloating]) -> None:
    sides = " ".join(map(str, [*values.shape, *[1] * (_AXES - values.ndim)]))
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{sides}\n", encoding="ascii")
    values.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def _read(path: Path) -> NDArray[np.complex64]:
    """The first six axes."""
    sides = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()][:6]
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(sides, order="F")
