"""Networks against l1-SPIRiT on measured k-space and on measured phase, and the disc test.

Run with `python -m benchmarks.measured --scans FILE --bodies FILE [--bart] [--discs]`. Neither file
comes with the package: `--scans` is HDF5 of groups with a fully sampled `kspace`, complex,
`(coils, rows, columns)`; `--bodies` of complex images `(echoes, rows, columns)`, which get coils by
the law of Biot and Savart, noise of 0.005 and a correlation of 0.2, and are compared with their
images without noise. Random columns 4-fold with a centre of 0.08 and Poisson discs 8-fold, seed 1.

Two metrics: PSNR and SSIM over the image (convention fastmri), and the PSNR over the object alone
(pixels above 5 % of the maximum), which air, where a reference is noise, does not enter.

The disc test puts one disc of another phase into a bundled slice and asks what of it is left: the
mean over the disc of the image over that of the truth, beside the same for l1-SPIRiT.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import torch
from torch import Tensor

from applications.mri.evaluation.bart import bart_installed, bart_l1_wavelet
from applications.mri.evaluation.methods import network_methods
from applications.mri.evaluation.metrics import score
from applications.mri.network.weights import Trained, weights_named
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom, PoissonDisc, Sampling
from applications.mri.simulation.anatomy import load_anatomies
from applications.mri.simulation.coils import biot_savart_coils
from applications.mri.simulation.simulate import noise_covariance, simulate
from benchmarks.measure import machine

SAMPLINGS: dict[str, Sampling] = {
    "random 4 x": CartesianRandom(4, 0.08),
    "Poisson 8 x": PoissonDisc(8),
}
SEED = 1
BART_LAMDAS = (1e-3, 3e-3, 1e-2, 3e-2)
THRESHOLDS = (1e-3, 2e-3, 4e-3)
OBJECT = 0.05
RADII, DEGREES, CENTRE = (3, 5, 8, 14), (0, 90, 180), (128, 100)

Method = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A fully sampled slice.

    Attributes:
        name: of it.
        kspace: ``(coils, rows, columns)``.
        reference: magnitude, ``(rows, columns)``.
    """

    name: str
    kspace: Tensor
    reference: Tensor


def measured(path: Path) -> Iterator[Case]:
    """The scans of a file whose groups have a `kspace`."""
    with h5py.File(path) as file:
        for name in file:
            if f"{name}/kspace" in file:
                kspace = torch.from_numpy(file[f"{name}/kspace"][()])
                yield Case(name, kspace, rss(ifft2c(kspace)))


def bodies(path: Path, names: tuple[str, ...], n_coils: int = 8) -> Iterator[Case]:
    """Complex images with simulated coils and noise."""
    with h5py.File(path) as file:
        for name in names:
            image = torch.from_numpy(file[name][0])
            generator = torch.Generator().manual_seed(SEED)
            clean = biot_savart_coils((image.shape[0], image.shape[1]), n_coils, generator) * image
            factor = torch.linalg.cholesky(noise_covariance(n_coils, generator, 0.2))
            white = torch.view_as_complex(torch.randn(*clean.shape, 2, generator=generator))
            noise = torch.einsum("cd,dxy->cxy", factor.to(torch.complex64), white)
            yield Case(name, fft2c(clean) + 0.005 * noise, rss(clean))


def object_psnr(reference: Tensor, image: Tensor) -> float:
    """PSNR of pixels above 5 % of the maximum alone [dB]."""
    inside = reference > OBJECT * reference.max()
    square = (image - reference)[inside].square().mean()
    return 10 * math.log10(float(reference.max() ** 2 / square))


def methods_of(trained: Trained, *, bart: bool) -> dict[str, Method]:
    """The methods of the table."""
    found: dict[str, Method] = {"zero-filled": lambda kspace, _: rss(ifft2c(kspace))}
    networks = network_methods(trained)
    if bart:
        for lamda in BART_LAMDAS:
            found[f"BART {lamda:g}"] = lambda kspace, mask, lamda=lamda: bart_l1_wavelet(
                kspace, mask, kspace, lamda
            )
    for threshold in THRESHOLDS:
        found[f"l1-SPIRiT {threshold:g}"] = lambda kspace, mask, threshold=threshold: rss(
            l1_spirit(kspace, mask, threshold)
        )
    found["l1-SPIRiT by noise"] = lambda kspace, mask: rss(l1_spirit(kspace, mask))
    return found | networks


def table(cases: list[Case], methods: dict[str, Method]) -> None:
    """Print PSNR / SSIM over the image, PSNR over the object, and seconds."""
    means: dict[str, list[tuple[float, float, float]]] = {}
    for case in cases:
        for sampling_name, sampling in SAMPLINGS.items():
            shape = (case.kspace.shape[1], case.kspace.shape[2])
            mask = sampling.mask(shape, torch.Generator().manual_seed(SEED))
            for name, method in methods.items():
                began = time.perf_counter()
                image = method(case.kspace * mask, mask)
                spent = time.perf_counter() - began
                found = score(case.reference[None], image[None])
                inside = object_psnr(case.reference, image)
                means.setdefault(f"{sampling_name}, {name}", []).append(
                    (found.psnr, found.ssim, inside)
                )
                print(
                    f"| {case.name} | {sampling_name} | {name} | {found.psnr:.2f} | "
                    f"{found.ssim:.3f} | {inside:.2f} | {spent:.1f} |",
                    flush=True,
                )
    for name, rows in means.items():
        psnr, ssim, inside = (statistics.fmean(column) for column in zip(*rows, strict=True))
        print(f"| mean | {name} | {psnr:.2f} | {ssim:.3f} | {inside:.2f} |")


def discs(method: Method) -> None:
    """Print the share of a disc that is left, for the method over that for l1-SPIRiT."""
    image = load_anatomies()["brain_t1_axial"]
    image = image[len(image) // 2]
    n = image.shape[-1]
    down, across = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    for radius in RADII:
        squares = (down - CENTRE[0]) ** 2 + (across - CENTRE[1]) ** 2
        disc = squares <= radius**2
        ring = (squares > (radius + 2) ** 2) & (squares <= (radius + 5) ** 2)
        for degrees in DEGREES:
            turned = torch.where(
                disc,
                torch.polar(torch.tensor(0.6), torch.tensor(math.radians(degrees))),
                image + 0j,
            )
            scan = simulate(image, 8, torch.Generator().manual_seed(SEED), 0.01)
            smooth = scan.image / scan.image.abs().clamp_min(1e-6)
            clean = scan.coils * torch.where(image > 0, smooth, 1.0) * turned
            noisy = scan.kspace - fft2c(scan.clean) + fft2c(clean)
            for name, sampling in SAMPLINGS.items():
                mask = sampling.mask((n, n), torch.Generator().manual_seed(SEED))
                truth = rss(clean)
                ours, classical = method(noisy * mask, mask), rss(l1_spirit(noisy * mask, mask))
                share, other = (
                    float(x[disc].mean() / truth[disc].mean()) for x in (ours, classical)
                )
                around = float((ours - truth)[ring].abs().mean() / truth[ring].mean())
                print(
                    f"| {radius} | {degrees} | {name} | {share:.3f} | {other:.3f} | "
                    f"{share / other:.3f} | {around:.3f} |",
                    flush=True,
                )


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=Path)
    parser.add_argument("--bodies", type=Path)
    parser.add_argument("--names", default="body_2,body_4,body_7", help="Of the bodies.")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--bart", action="store_true")
    parser.add_argument("--discs", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trained = weights_named(arguments.weights)
    print(machine())
    cases = list(measured(arguments.scans)) if arguments.scans else []
    if arguments.bodies:
        cases += bodies(arguments.bodies, tuple(arguments.names.split(",")))
    if cases:
        print("| scan | sampling | method | PSNR [dB] | SSIM | PSNR, object [dB] | s |")
        print("|---|---|---|---|---|---|---|")
        table(cases, methods_of(trained, bart=arguments.bart and bart_installed()))
    if arguments.discs:
        print("| radius | degrees | sampling | ours | l1-SPIRiT | ratio | error around |")
        print("|---|---|---|---|---|---|---|")
        discs(network_methods(trained)["ours"])


if __name__ == "__main__":
    main()
