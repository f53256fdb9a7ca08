"""The bundled weights on held-out slices, against zero filling and the classical methods.

Run with `python -m benchmarks.pretrained [--size 256] [--threads 1] [--anatomies FILE]`; several
minutes a sampling. `--anatomies` takes magnitude images of another head, NIfTI or HDF5, as
`simulate` does. The classical methods are tuned on validation slices, for every sampling anew.
The line below a table is the PSNR over the object alone: what reconstructs empty air as empty
gains much in the others.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from applications.mri.data import SliceDataset, fully_sampled
from applications.mri.evaluation.methods import (
    Method,
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.metrics import Scores
from applications.mri.evaluation.scoring import Evaluation, evaluate
from applications.mri.network.weights import pretrained
from applications.mri.sampling import (
    CartesianEquispaced,
    CartesianRandom,
    GaussianPoints,
    PoissonDisc,
    Radial,
    Sampling,
)
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder
from benchmarks.measure import machine

SEEN: dict[str, Sampling] = {
    "random 4 x": CartesianRandom(4, 0.08),
    "Poisson 8 x": PoissonDisc(8),
}
UNSEEN: dict[str, Sampling] = {
    "random 3 x": CartesianRandom(3, 0.08),
    "random 5 x": CartesianRandom(5, 0.08),
    "random 8 x, 4 % centre": CartesianRandom(8, 0.04),
    "equispaced 4 x": CartesianEquispaced(4, 0.08),
    "Poisson 12 x": PoissonDisc(12),
    "Gaussian 2-D 8 x": GaussianPoints(8),
    "radial, 32 spokes": Radial(32),
}
SEED = 2  # of the masks
BEST = "l1-SPIRiT"  # of the classical methods
COILS = 8


def cell(scores: Scores) -> str:
    """PSNR and SSIM."""
    return f"{scores.psnr:.1f} / {scores.ssim:.3f}"


def row(name: str, scores: dict[str, Scores]) -> str:
    """A row of a table, with the gain over the best classical method."""
    gain = scores["ours"].psnr - scores[BEST].psnr
    return " | ".join(["", name, *map(cell, scores.values()), f"{gain:+.1f}", ""]).strip()


def remembered(method: Method, images: list[Tensor]) -> Method:
    """A method that leaves its images in a list."""

    def call(kspace: Tensor, mask: Tensor) -> Tensor:
        images.append(method(kspace, mask))
        return images[-1]

    return call


def inside(images: list[Tensor], slices: SliceDataset) -> float:
    """Mean PSNR over volumes, of pixels above 5 % of the volume's maximum alone.

    Args:
        images: of all slices, in their order.
        slices: fully sampled.

    Returns:
        In decibel.
    """
    each, found = iter(images), []
    for file in slices.files:
        references = torch.stack(
            [fully_sampled(file.read_slice(i))[1] for i in range(file.n_slices)]
        )
        differences = torch.stack([next(each) for _ in references]) - references
        largest = references.max()
        square = differences[references > 0.05 * largest].square().mean()
        found.append(10 * math.log10(float(largest**2 / square)))
    return statistics.fmean(found)


def report(name: str, found: Evaluation) -> None:
    """Print the scores of every volume, and their mean."""
    columns = [f"{name}, achieved", *found.mean, f"gain over {BEST} [dB]"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for one in found.volumes:
        print(row(f"{one.name}, {one.acceleration:.1f} x", one.scores))
    print(row("**mean**", found.mean), flush=True)


def main() -> None:
    """Simulate, tune, evaluate, and print a table a sampling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--anatomies", type=Path)
    parser.add_argument("--unseen", action="store_true", help="Samplings that were not trained.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trained = pretrained()
    coils = trained.network.architecture.n_coils or COILS
    print(machine())
    print(
        f"PSNR [dB] / SSIM, convention fastmri, {arguments.size} x {arguments.size}, {coils} coils"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SimulationSettings(arguments.size, coils, anatomies=arguments.anatomies)
        files = simulate_folder(Path(folder), settings)
        data = {role: SliceDataset(paths) for role, paths in files.items()}
        for name, sampling in (UNSEEN if arguments.unseen else SEEN).items():
            swept = sweep_regularisation(data["validation"], sampling, SEED + 1)
            methods = classical_methods(swept) | network_methods(trained)
            images: dict[str, list[Tensor]] = {name: [] for name in (BEST, "ours")}
            methods |= {name: remembered(methods[name], kept) for name, kept in images.items()}
            report(name, evaluate(methods, data["test"], sampling, SEED))
            best, ours = (inside(kept, data["test"]) for kept in images.values())
            print(f"Object alone: {BEST} {best:.1f}, ours {ours:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
