"""The commands that write and read scans: `simulate`, `reconstruct` and `evaluate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import Seed, Threads, console, progress_bars, use_threads
from applications.files import make_place, write_json
from applications.mri.commands.shared import print_scores
from applications.mri.data import SliceDataset
from applications.mri.data.coil_fits import changes, coil_fits
from applications.mri.data.images import check_image_path
from applications.mri.evaluation.figures import draw_image
from applications.mri.evaluation.methods import (
    BART,
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.metrics import Convention
from applications.mri.evaluation.scanning import ScanImages, reconstruct_scan
from applications.mri.evaluation.scoring import evaluate
from applications.mri.formats.nifti import is_nifti
from applications.mri.network.weights import PRETRAINED, weights_named
from applications.mri.sampling import FromFile, Masking
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder

Weights = Annotated[
    str, typer.Option(help="Trained weights, a safetensors file; or pretrained, the bundled ones.")
]


class ReconstructionMethod(StrEnum):
    """What makes images of a scan."""

    NETWORK = "network"
    L1_SPIRIT = "l1-spirit"


def simulate_command(
    out: Annotated[Path, typer.Option(help="Folder for train/, validation/ and test/.")],
    settings: SimulationSettings,
) -> None:
    """Write fully sampled multi-coil scans of magnitude images, in the layout of fastMRI."""
    with progress_bars() as report:
        files = simulate_folder(out, settings, lambda k, n: report("simulating scans", k / n))
    for role, paths in files.items():
        console.print(f"{role}: {len(paths)} files in {out / role}")


def evaluate_command(
    data: Annotated[Path, typer.Option(help="Folder of fully sampled .h5 scans.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    masking: Annotated[Masking, "Mask"],
    weights: Weights = PRETRAINED,
    baselines: Annotated[
        Path | None,
        typer.Option(help="Folder of validation scans to tune the classical methods on."),
    ] = None,
    metrics: Annotated[
        Convention, typer.Option(help="Range and errors over the volume, or over each slice.")
    ] = Convention.FASTMRI,
    seed: Seed = 2,
    threads: Threads = 0,
) -> None:
    """Score a network, and the classical methods if they can be tuned, on the same masks."""
    use_threads(threads)
    trained, slices = weights_named(weights), SliceDataset(data)
    make_place(out)
    for change in changes(coil_fits(slices.files, trained.network.architecture.n_coils)):
        console.print(change)
    sampling = masking.sampling
    with progress_bars() as report:
        swept = {}
        if baselines is not None:
            report("tuning the baselines", 0.0)
            swept = sweep_regularisation(SliceDataset(baselines), sampling, seed + 1)
            if BART not in swept:
                console.print("BART is not installed: its l1-wavelet with two maps is left out.")
        methods = classical_methods(swept) | network_methods(trained)
        found = evaluate(
            methods, slices, sampling, seed, lambda k, n: report("evaluating", k / n), metrics
        )
    content = {"weights": weights, "sampling": repr(sampling), "seed": seed}
    write_json(out, content | found.as_json())
    print_scores(found, f"{len(slices.files)} volumes of {data}")
    console.print(f"Results  {out}")


def reconstruct_command(
    scan: Annotated[
        Path,
        typer.Option(
            help="Undersampled scan: fastMRI's HDF5, ISMRMRD, BART's .cfl, or what the names of "
            "M4Raw's repetitions have in common."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Images to write: .h5, .nii or .nii.gz.")],
    method: Annotated[
        ReconstructionMethod,
        typer.Option(help="The network of --weights; or l1-spirit, which needs no training."),
    ] = ReconstructionMethod.NETWORK,
    weights: Weights = PRETRAINED,
    png: Annotated[Path | None, typer.Option(help="The middle slice as a picture.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="File of a mask within what was measured: .npy, .npz, .h5, .cfl, .png."),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Reconstruct all slices; the mask is the one given, the scan's, or what was measured."""
    use_threads(threads)
    trained = weights_named(weights) if method is ReconstructionMethod.NETWORK else None
    for place in (out, png):
        if place is not None:
            make_place(place)
    check_image_path(out)
    given = None if mask is None else FromFile(mask)
    made_by = {"method": method.value} if trained is None else {"weights": Path(weights).name}
    record = {"source": scan.name} | made_by
    with progress_bars() as report:
        found = reconstruct_scan(
            scan, trained, out, given, lambda share: report("reconstructing", share), record
        )
    if png is not None:
        draw_image(png, found.middle)
    _print_images(found, out)


def _print_images(found: ScanImages, out: Path) -> None:
    console.print(f"Acceleration {found.acceleration:.2f} in the mean over slices")
    for change in changes(found.coils):
        console.print(change)
    doubtful = [str(i) for i, residual in enumerate(found.data_residuals) if residual > 1]
    if doubtful:
        console.print(
            f"Look at slice {', '.join(doubtful)} before use: farther from what was measured than "
            "an empty image, so mostly noise, or not like anything the weights were trained on."
        )
    if is_nifti(out) and not found.oriented:
        console.print("The scan states no orientation; the images have none.")
    console.print(f"Images   {out}")
