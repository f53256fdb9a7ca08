"""What reconstructs: a network and the classical methods, as functions of k-space and mask."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from applications.mri.data import SliceDataset, fully_sampled
from applications.mri.evaluation.bart import bart_installed, bart_l1_wavelet
from applications.mri.evaluation.baselines import (
    Case,
    Sweep,
    best_lamda,
    calibration_width,
    espirit_maps,
    l1_wavelet,
    sense,
    sparse_spirit,
    zero_filled,
)
from applications.mri.network.scan import Scan
from applications.mri.network.weights import Trained
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.sampling import Sampling

Method = Callable[[Tensor, Tensor], Tensor]  # (kspace, mask) -> magnitude image, all unbatched
_Value = TypeVar("_Value")
L1_SPIRIT, BART = "l1-SPIRiT", "BART"  # l1-wavelet with two maps
_REGULARISED = {
    "CG-SENSE": sense,
    "l1-wavelet": l1_wavelet,
    BART: bart_l1_wavelet,
    L1_SPIRIT: sparse_spirit,
}
_LAMDAS = {
    "CG-SENSE": (1e-3, 1e-2, 1e-1),
    "l1-wavelet": (3e-3, 1e-2, 3e-2),
    BART: (1e-3, 3e-3, 1e-2, 3e-2),
    L1_SPIRIT: (1e-3, 2e-3, 4e-3),
}
_SMALLEST_CALIBRATION = 4


def network_methods(trained: Trained) -> dict[str, Method]:
    """The network, and what it starts from where that is more than zero filling.

    Args:
        trained: network and weights; scans of other coil counts get its own, see `coil_counts`.

    Returns:
        By the name that tables show.
    """
    network = trained.network

    @_of_the_last
    def prepare(kspace: Tensor, mask: Tensor) -> Scan:
        matrix = coil_matrix(kspace, network.architecture.coils_of(len(kspace)))
        return network.prepare(with_coils(matrix, kspace)[None], mask)

    def ours(kspace: Tensor, mask: Tensor) -> Tensor:
        return network.reconstruct(prepare(kspace, mask), trained.control).image[0]

    def start(kspace: Tensor, mask: Tensor) -> Tensor:
        scan = prepare(kspace, mask)
        return (rss(ifft2c(scan.start)) * scan.scale[:, 0])[0]

    if network.architecture.gains:
        return {"start": start, "ours": ours}
    if network.architecture.self_consistency:
        return {"self-consistent start": start, "ours": ours}
    return {"ours": ours}


def classical_methods(swept: dict[str, Sweep]) -> dict[str, Method]:
    """Zero filling, and the methods that have a regularisation.

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

    BART is left out where it is not installed.

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
    return {
        name: best_lamda(method, _LAMDAS[name], cases)
        for name, method in _REGULARISED.items()
        if name != BART or bart_installed()
    }


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
