"""Images and error maps of an evaluation, in files: HDF5 of all slices, and a picture of one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from applications.errors import InputError
from applications.mri.data import VolumeFile
from applications.mri.data.writing import hdf5_file
from applications.mri.evaluation.figures import Panel, draw_errors
from applications.mri.evaluation.scoring import VolumeImages
from applications.mri.formats.hdf5 import opened
from applications.outputs import PICTURE, Kind, Output


def _is_kept(path: Path) -> bool:
    with opened(path) as file:
        return file.names() == ["errors", "images", "reference"]


KEPT = Kind("a file of such images", _is_kept)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for the outputs of each file: without suffix, where that tells files apart.

    Args:
        paths: files, in one folder or several.

    Returns:
        Names, all different even where capitals are not told apart.

    Raises:
        InputError: if two files have one name.
    """
    stems = Counter(path.stem.casefold() for path in paths)
    names = [path.stem if stems[path.stem.casefold()] == 1 else path.name for path in paths]
    check_unlike(names)
    return names


def check_unlike(names: Sequence[str]) -> None:
    """Refuses names of outputs that are one, be it but for capitals.

    Args:
        names: of the outputs.

    Raises:
        InputError: if two are.
    """
    twice = [name for name, n in Counter(name.casefold() for name in names).items() if n > 1]
    if twice:
        raise InputError(
            f"each scan needs outputs of its own, {twice[0]!r} would be of two; rename a scan."
        )


@dataclass(frozen=True)
class KeptImages:
    """Writes ``<name>.h5`` and ``<name>.png`` of every volume of an evaluation.

    Attributes:
        folder: for them.
        files: that are evaluated.
    """

    folder: Path
    files: tuple[VolumeFile, ...]

    @property
    def outputs(self) -> list[Output]:
        """What will be written."""
        paths = list(dict.fromkeys(file.path for file in self.files))
        named = dict(zip(paths, names_of(paths), strict=True))
        names = [
            named[file.path] if file.n_volumes == 1 else f"{named[file.path]}_volume{file.volume}"
            for file in self.files
        ]
        check_unlike(names)
        return [
            one
            for name in names
            for one in (
                Output(self.folder / f"{name}.h5", KEPT),
                Output(self.folder / f"{name}.png", PICTURE),
            )
        ]

    def __call__(self, images: VolumeImages) -> None:
        """Write those of one volume.

        Args:
            images: what `scoring.evaluate` tells.

        Raises:
            InputError: if an image is not finite, or a file cannot be written.
        """
        each = [(file.path, file.volume) for file in self.files]
        number = each.index((images.file.path, images.file.volume))
        values, picture = (one.path for one in self.outputs[2 * number : 2 * number + 2])
        for name, found in images.found.items():
            if not bool(torch.isfinite(found).all()):
                raise InputError(f"{values}: images must be finite, those of {name!r} are not.")
        with hdf5_file(values) as file:
            file["reference"] = images.reference.numpy()
            for name, found in images.found.items():
                file[f"images/{name}"] = found.numpy()
                file[f"errors/{name}"] = (found - images.reference).abs().numpy()
        middle = len(images.reference) // 2
        shown = {name: found[middle] for name, found in images.found.items()}
        title = f"{images.file.label}, slice {self._slice(images.file, middle)}"
        draw_errors(picture, Panel(title, shown, images.reference[middle]))

    @staticmethod
    def _slice(file: VolumeFile, index: int) -> int:
        return index if file.block is None else file.block[index]
