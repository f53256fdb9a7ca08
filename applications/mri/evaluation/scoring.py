"""Scores methods of reconstruction on the same undersampled volumes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import Slice, SliceDataset, VolumeFile, fully_sampled
from applications.mri.evaluation.methods import Method
from applications.mri.evaluation.metrics import Convention, Scores, mean_scores, score
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import centre_crop
from applications.mri.sampling import Sampling


@dataclass(frozen=True, eq=False)
class VolumeScores:
    """Scores of every method on one volume.

    Attributes:
        name: of the file.
        acceleration: achieved by its mask.
        scores: by method, in the order they were given.
    """

    name: str
    acceleration: float
    scores: dict[str, Scores]


@dataclass(frozen=True, eq=False)
class VolumeImages:
    """Images of one volume.

    Attributes:
        file: the volume.
        acceleration: achieved by the masks, in the mean over slices.
        reference: fully sampled magnitudes, ``(slices, rows, columns)``.
        found: what each method made of it, of the shape of `reference`.
    """

    file: VolumeFile
    acceleration: float
    reference: Tensor
    found: dict[str, Tensor]


Keep = Callable[[VolumeImages], None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of several volumes.

    Attributes:
        volumes: one record a volume.
        seconds: time a slice by method [s]; what methods share counts for the first that needs it.
    """

    volumes: list[VolumeScores]
    seconds: dict[str, float]

    @property
    def mean(self) -> dict[str, Scores]:
        """Mean over volumes by method."""
        return {
            name: mean_scores(volume.scores[name] for volume in self.volumes)
            for name in self.volumes[0].scores
        }

    @property
    def convention(self) -> Convention:
        """By which all scores were taken."""
        return next(iter(self.volumes[0].scores.values())).convention

    def as_json(self) -> dict[str, object]:
        """Plain values; an infinite PSNR is inf, which `files.write_json` makes null."""
        return {
            "convention": self.convention,
            "mean": {name: vars(scores) for name, scores in self.mean.items()},
            "volumes": [
                {
                    "name": v.name,
                    "acceleration": v.acceleration,
                    "scores": {name: vars(scores) for name, scores in v.scores.items()},
                }
                for v in self.volumes
            ],
            "seconds_per_slice": self.seconds,
        }


def evaluate(
    methods: dict[str, Method],
    slices: SliceDataset,
    sampling: Sampling,
    seed: int,
    after_volume: Callable[[int, int], None] | None = None,
    convention: Convention = Convention.FASTMRI,
    keep: Keep | None = None,
) -> Evaluation:
    """Scores methods, with one mask a volume.

    Args:
        methods: by name.
        slices: fully sampled scans.
        sampling: undersamples them.
        seed: of the masks.
        after_volume: told of the volumes done and to be done.
        convention: of the scores.
        keep: told of the images of every volume.

    Returns:
        The scores.

    Raises:
        InputError: if a scan is undersampled already, or a method cannot use it.
    """
    generator = torch.Generator().manual_seed(seed)
    seconds = dict.fromkeys(methods, 0.0)
    volumes: list[VolumeScores] = []
    for i, file in enumerate(slices.files, start=1):
        mask = sampling.mask(file.shape, generator)
        images = _volume_images(methods, file, mask, seconds)
        try:
            scores = {
                name: score(images.reference, one, convention) for name, one in images.found.items()
            }
        except InputError as error:
            raise InputError(f"{file.path}: {error}") from error
        volumes.append(VolumeScores(file.label, images.acceleration, scores))
        if keep is not None:
            keep(images)
        if after_volume is not None:
            after_volume(i, len(slices.files))
    return Evaluation(volumes, {name: spent / len(slices) for name, spent in seconds.items()})


def _volume_images(
    methods: dict[str, Method], file: VolumeFile, mask: Tensor, seconds: dict[str, float]
) -> VolumeImages:
    """Images of one volume; the time that methods take is added to `seconds`."""
    references: list[Tensor] = []
    accelerations: list[float] = []
    images: dict[str, list[Tensor]] = {name: [] for name in methods}
    for index in range(file.n_slices):
        one = file.read_slice(index)
        kspace, reference = fully_sampled(one)
        references.append(reference * one.unit)
        used = mask & one.measured
        accelerations.append(acceleration_of(used))
        undersampled = kspace * used
        for name, method in methods.items():
            began = time.perf_counter()
            image = _named(one, method, undersampled, used)
            seconds[name] += time.perf_counter() - began
            shape = (reference.shape[0], reference.shape[1])
            images[name].append(centre_crop(image, shape) * one.unit)
    found = {name: torch.stack(every) for name, every in images.items()}
    return VolumeImages(file, fmean(accelerations), torch.stack(references), found)


def _named(one: Slice, method: Method, kspace: Tensor, mask: Tensor) -> Tensor:
    """What a method makes of a slice; an error names the file and the slice."""
    try:
        return method(kspace, mask)
    except InputError as error:
        raise InputError(f"{one.path}: {error} This is slice {one.index}.") from error


def table_rows(evaluation: Evaluation) -> Sequence[tuple[str, ...]]:
    """The means as text: method, PSNR, gain, PSNR over the object, SSIM, NMSE, time a slice."""
    mean = evaluation.mean
    base = next(iter(mean.values())).psnr
    return [
        (
            name,
            f"{scores.psnr:.2f}",
            f"{scores.psnr - base:+.2f}",
            "-" if scores.object_psnr is None else f"{scores.object_psnr:.2f}",
            f"{scores.ssim:.3f}",
            f"{scores.nmse:.4f}",
            f"{evaluation.seconds[name]:.2f}",
        )
        for name, scores in mean.items()
    ]
