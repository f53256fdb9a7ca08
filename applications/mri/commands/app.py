"""The command line: `python -m applications.mri COMMAND`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from applications.command_line import Seed, Threads, guarded, progress_bars, use_threads
from applications.files import make_place, write_json
from applications.mri.commands.choices import (
    Acceleration,
    Calibration,
    Centre,
    MaskOption,
    Spokes,
    Width,
)
from applications.mri.commands.demo import DemoSettings, run_demo
from applications.mri.commands.meta import meta_train, transfer
from applications.mri.commands.train import train_command
from applications.mri.data import SliceDataset
from applications.mri.data.coil_fits import changes, coil_fits
from applications.mri.data.images import check_image_path
from applications.mri.evaluation.figures import draw_image
from applications.mri.evaluation.methods import (
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.metrics import Convention
from applications.mri.evaluation.scanning import reconstruct_scan
from applications.mri.evaluation.scoring import Evaluation, evaluate, table_rows
from applications.mri.formats.nifti import Plane, is_nifti
from applications.mri.network.weights import PRETRAINED, weights_named
from applications.mri.sampling import FromFile, chosen_sampling
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Multi-coil MRI reconstruction without coil sensitivities, trained by multipliers.",
)
console = Console()


Weights = Annotated[
    str, typer.Option(help="Trained weights, a safetensors file; or pretrained, the bundled ones.")
]


def main() -> None:
    """Run the command line."""
    app()


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for figure, results and weights.")],
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Train a network of its own so long, instead of the bundled weights.", min=1.0
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="Rows and columns of the simulation.", min=32)] = 128,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Simulate, evaluate and reconstruct a real scan, all on bundled data."""
    use_threads(threads)
    with progress_bars(console) as report:
        found = run_demo(out, DemoSettings(seconds, seed, size), report)
    _print(found.evaluation, "Held-out slices, Cartesian random 4 x, mean over anatomies")
    console.print(f"Figure   {found.figure}")
    console.print(f"Results  {found.results}")
    if found.weights is not None:
        console.print(f"Weights  {found.weights}")
    console.print(f"All of it took {found.seconds:.0f} s.")


@app.command()
@guarded
def simulate(
    out: Annotated[Path, typer.Option(help="Folder for train/, validation/ and test/.")],
    size: Annotated[int, typer.Option(help="Rows and columns.", min=16)] = 128,
    coils: Annotated[int, typer.Option(help="Receive coils.", min=1)] = 8,
    noise: Annotated[float, typer.Option(help="Noise in units of image magnitude.", min=0)] = 0.01,
    repeats: Annotated[int, typer.Option(help="Training volumes an anatomy.", min=1)] = 1,
    anatomies: Annotated[
        Path | None, typer.Option(help="Magnitude images: NIfTI, or HDF5 of groups.")
    ] = None,
    plane: Annotated[
        Plane | None, typer.Option(help="Slices of NIfTI; axial, stored: as they lie.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Write fully sampled multi-coil scans of magnitude images, in the layout of fastMRI."""
    settings = SimulationSettings(size, coils, noise, repeats, seed, anatomies, plane)
    with progress_bars(console) as report:
        files = simulate_folder(out, settings, lambda k, n: report("simulating scans", k / n))
    for role, paths in files.items():
        console.print(f"{role}: {len(paths)} files in {out / role}")


app.command(name="train")(guarded(train_command))


@app.command(name="evaluate")
@guarded
def evaluate_command(
    data: Annotated[Path, typer.Option(help="Folder of fully sampled .h5 scans.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    weights: Weights = PRETRAINED,
    baselines: Annotated[
        Path | None, typer.Option(help="Folder of validation scans to tune SigPy's methods on.")
    ] = None,
    mask: MaskOption = "random",
    acceleration: Acceleration = None,
    center: Centre = None,
    calibration: Calibration = None,
    width: Width = None,
    spokes: Spokes = None,
    metrics: Annotated[
        Convention, typer.Option(help="Range and errors over the volume, or over each slice.")
    ] = Convention.FASTMRI,
    seed: Seed = 2,
    threads: Threads = 0,
) -> None:
    """Score a network, and the classical methods if they can be tuned, on the same masks."""
    use_threads(threads)
    trained = weights_named(weights)
    slices = SliceDataset(data)
    make_place(out)
    for change in changes(coil_fits(slices.files, trained.network.architecture.n_coils)):
        console.print(change)
    sampling = chosen_sampling(
        mask,
        acceleration=acceleration,
        center_fraction=center,
        calibration=calibration,
        width=width,
        spokes=spokes,
    )
    with progress_bars(console) as report:
        swept = {}
        if baselines is not None:
            report("tuning the baselines", 0.0)
            swept = sweep_regularisation(SliceDataset(baselines), sampling, seed + 1)
        methods = classical_methods(swept) | network_methods(trained)
        found = evaluate(
            methods, slices, sampling, seed, lambda k, n: report("evaluating", k / n), metrics
        )
    content = {"weights": weights, "sampling": repr(sampling), "seed": seed}
    write_json(out, content | found.as_json())
    _print(found, f"{len(slices.files)} volumes of {data}")
    console.print(f"Results  {out}")


@app.command()
@guarded
def reconstruct(
    scan: Annotated[
        Path,
        typer.Option(
            help="Undersampled scan: fastMRI's HDF5, ISMRMRD, BART's .cfl, or what the names of "
            "M4Raw's repetitions have in common."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Images to write: .h5, .nii or .nii.gz.")],
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
    trained = weights_named(weights)
    for place in (out, png):
        if place is not None:
            make_place(place)
    check_image_path(out)
    given = None if mask is None else FromFile(mask)
    with progress_bars(console) as report:
        found = reconstruct_scan(
            scan,
            trained,
            out,
            given,
            lambda share: report("reconstructing", share),
            {"source": scan.name, "weights": Path(weights).name},
        )
    if png is not None:
        draw_image(png, found.middle)
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


app.command(name="meta-train")(meta_train)
app.command()(transfer)


def _print(evaluation: Evaluation, title: str) -> None:
    table = Table(title=title, caption=f"Metrics: {evaluation.convention}")
    for name in ("method", "PSNR [dB]", "gain [dB]", "SSIM", "NMSE", "s / slice"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in table_rows(evaluation):
        table.add_row(*row)
    console.print(table)
