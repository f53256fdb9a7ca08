"""Scores a network and the classical methods on the same undersampled volumes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.baselines import (
    Case,
    Sweep,
    best_lamda,
    calibration_width,
    espirit_maps,
    l1_wavelet,
    sense,
    zero_filled,
)
from applications.mri.coil_counts import coil_matrix, with_coils
from applications.mri.data import SliceDataset, fully_sampled
from applications.mri.metrics import Convention, Scores, mean_scores, score
from applications.mri.operators import centre_crop, ifft2c, rss
from applications.mri.physics.masks import acceleration_of
from applications.mri.sampling import Sampling
from applications.mri.weights import Trained

Method = Callable[[Tensor, Tensor], Tensor]  # (kspace, mask) -> magnitude image, all unbatched
_Value = TypeVar("_Value")
_REGULARISED = {"CG-SENSE": sense, "l1-wavelet": l1_wavelet}
_LAMDAS = {"CG-SENSE": (1e-3, 1e-2, 1e-1), "l1-wavelet": (3e-3, 1e-2, 3e-2)}
_SMALLEST_CALIBRATION = 4


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


def network_methods(trained: Trained) -> dict[str, Method]:
    """The network, and what it starts from where that is more than zero filling.

    Args:
        trained: network and weights; scans of other coil counts get its own, see `coil_counts`.

    Returns:
        By the name that tables show.
    """
    network = trained.network
    count = network.architecture.n_coils
    prepare = _of_the_last(
        lambda kspace, mask: network.prepare(
            with_coils(coil_matrix(kspace, count), kspace)[None], mask
        )
    )

    def ours(kspace: Tensor, mask: Tensor) -> Tensor:
        return network.reconstruct(prepare(kspace, mask), trained.control).image[0]

    def start(kspace: Tensor, mask: Tensor) -> Tensor:
        scan = prepare(kspace, mask)
        return (rss(ifft2c(scan.start)) * scan.scale[:, 0])[0]

    if network.architecture.self_consistency:
        return {"self-consistent start": start, "ours": ours}
    return {"ours": ours}


def classical_methods(swept: dict[str, Sweep]) -> dict[str, Method]:
    """Zero filling, and ESPIRiT with one map + the methods that have a regularisation.

    Args:
        swept: from `sweep_regularisation`; empty leaves zero filling alone.

    Returns:
        By the name that tables show.
    """
    maps_of = _of_the_last(_maps)

    def regularised(name: str, lamda: float) -> Method:
        return lambda kspace, mask: _REGULARISED[name](kspace, mask, maps_of(kspace, mask), lamda)

    zero: dict[str, Method] = {"zero-filled": lambda kspace, _mask: zero_filled(kspace)}
    return zero | {name: regularised(name, one.lamda) for name, one in swept.items()}


def sweep_regularisation(slices: SliceDataset, sampling: Sampling, seed: int) -> dict[str, Sweep]:
    """The best regularisation of the classical methods on the middle slice of each volume.

    Args:
        slices: validation scans, fully sampled.
        sampling: undersamples them.
        seed: of the masks.

    Returns:
        By the name that tables show.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for file in slices.files:
        kspace, reference = fully_sampled(file.read_slice(file.n_slices // 2))
        mask = sampling.mask(file.shape, generator)
        undersampled = kspace * mask
        cases.append(Case(undersampled, mask, _maps(undersampled, mask), reference))
    return {name: best_lamda(method, _LAMDAS[name], cases) for name, method in _REGULARISED.items()}


def evaluate(
    methods: dict[str, Method],
    slices: SliceDataset,
    sampling: Sampling,
    seed: int,
    after_volume: Callable[[int, int], None] | None = None,
    convention: Convention = Convention.FASTMRI,
) -> Evaluation:
    """Scores methods, with one mask a volume.

    Args:
        methods: by name.
        slices: fully sampled scans.
        sampling: undersamples them.
        seed: of the masks.
        after_volume: told of the volumes done and to be done.
        convention: of the scores.

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
        references: list[Tensor] = []
        images: dict[str, list[Tensor]] = {name: [] for name in methods}
        for index in range(file.n_slices):
            kspace, reference = fully_sampled(file.read_slice(index))
            references.append(reference)
            undersampled = kspace * mask
            for name, method in methods.items():
                began = time.perf_counter()
                image = _named(file.path, method, undersampled, mask)
                seconds[name] += time.perf_counter() - began
                images[name].append(centre_crop(image, (reference.shape[0], reference.shape[1])))
        scores = {
            name: score(torch.stack(references), torch.stack(found), convention)
            for name, found in images.items()
        }
        volumes.append(VolumeScores(file.path.stem, acceleration_of(mask), scores))
        if after_volume is not None:
            after_volume(i, len(slices.files))
    return Evaluation(volumes, {name: spent / len(slices) for name, spent in seconds.items()})


def _named(path: Path, method: Method, kspace: Tensor, mask: Tensor) -> Tensor:
    """What a method makes of a slice; an error names the file."""
    try:
        return method(kspace, mask)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _of_the_last(
    function: Callable[[Tensor, Tensor], _Value],
) -> Callable[[Tensor, Tensor], _Value]:
    """`function`, evaluated once for the methods that ask for the same slice in turn."""
    kept: list[tuple[Tensor, _Value]] = []

    def call(kspace: Tensor, mask: Tensor) -> _Value:
        if not (kept and kept[0][0] is kspace):
            kept[:] = [(kspace, function(kspace, mask))]
        return kept[0][1]

    return call


def _maps(kspace: Tensor, mask: Tensor) -> Tensor:
    return espirit_maps(kspace, max(calibration_width(mask), _SMALLEST_CALIBRATION))


def table_rows(evaluation: Evaluation) -> Sequence[tuple[str, ...]]:
    """The means as text: method, PSNR, gain over the first method, SSIM, NMSE, time a slice."""
    mean = evaluation.mean
    base = next(iter(mean.values())).psnr
    return [
        (
            name,
            f"{scores.psnr:.2f}",
            f"{scores.psnr - base:+.2f}",
            f"{scores.ssim:.3f}",
            f"{scores.nmse:.4f}",
            f"{evaluation.seconds[name]:.2f}",
        )
        for name, scores in mean.items()
    ]
