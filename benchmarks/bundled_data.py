"""Makes the two anatomies of heads whose field of view is cut or wraps, from packages.

    apt-get download mricron-data && dpkg-deb -x mricron-data_*.deb packages
    pip download --no-deps pydeface && unzip pydeface-*.whl -d packages
    python -m benchmarks.bundled_data packages anatomy.h5

Other groups of the file are kept as they are. The measured scan, `gre.dat`, is a file of the source
distribution of twixtools 0.24, as it is.
"""

import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
from scipy.ndimage import zoom

SIZE = 256
MNI = (
    "McConnell Brain Imaging Centre, MNI: permission to use, copy, modify and distribute for any "
    "purpose without fee, with the copyright notice kept"
)
HEADS = {
    "skull_base_t1_axial": {
        "source": "Colin27 average brain (ch2), face and skull base, axial, T1, the middle 128 mm; "
        "image from Debian package mricron-data",
        "licence": MNI,
        "kind": "measured, field of view cut",
    },
    "head_wrapped_t1_coronal": {
        "source": "pydeface mean whole-head and neck template, coronal, T1",
        "licence": "MIT (pydeface)",
        "kind": "measured, group mean; scans of it have a field of view that wraps",
        "wrap": 0.5,
    },
}


def canonical(path: Path) -> np.ndarray:
    """A volume whose axes run right, anterior, superior."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj, np.float32)


def bytes_of(images: np.ndarray) -> np.ndarray:
    """Magnitudes as uint8, the darkest black and the brightest 0.2 % of the volume white."""
    images = images - images.min()
    white = np.quantile(images, 0.998)
    return (255 * (images / white).clip(0, 1)).round().astype(np.uint8)


def cut_axial(folder: Path) -> np.ndarray:
    """Levels that `brain_t1_axial` has not, from the neck to the eyes."""
    volume = canonical(folder / "usr/share/mricron/templates/ch2.nii.gz")
    top, left = ((n - SIZE // 2) // 2 for n in (volume.shape[1], volume.shape[0]))
    levels = [volume[:, ::-1, k].T for k in range(0, 48, 3)]
    cut = [one[top : top + SIZE // 2, left : left + SIZE // 2] for one in levels]
    return bytes_of(np.stack([zoom(one, 2, order=1) for one in cut]))


def coronal(folder: Path) -> np.ndarray:
    """From the back of the head to the forehead; rows run down."""
    volume = canonical(folder / "pydeface/data/mean_reg2mean.nii.gz")
    levels = np.stack([volume[:, k, ::-1].T for k in range(66, 194, 8)])
    missing = SIZE - levels.shape[2]
    return bytes_of(np.pad(levels, ((0, 0), (0, 0), (missing // 2, missing - missing // 2))))


def main(packages: Path, path: Path) -> None:
    """Replaces the groups of these heads, and leaves out what comes from elsewhere."""
    made = dict(zip(HEADS, (cut_axial(packages), coronal(packages)), strict=True))
    written = path.with_suffix(".new")
    with h5py.File(path) as old, h5py.File(written, "w") as new:
        new.attrs.update(old.attrs)
        for name in old:
            if name not in (*HEADS, "neck_t2star_axial"):
                old.copy(name, new)
        for name, images in made.items():
            new.create_dataset(
                f"{name}/images",
                data=images,
                chunks=(1, SIZE, SIZE),
                compression="gzip",
                compression_opts=9,
            )
            new[name].attrs.update(HEADS[name])
    written.replace(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
