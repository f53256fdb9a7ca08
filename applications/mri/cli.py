"""The command line: `python -m applications.mri demo|simulate|train|evaluate|reconstruct`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import h5py
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from applications.mri.data import Slice, SliceDataset, VolumeFile, implied_mask
from applications.mri.demo import DemoSettings, run_demo
from applications.mri.errors import InputError
from applications.mri.evaluation import (
    Evaluation,
    classical_methods,
    evaluate,
    network_methods,
    sweep_regularisation,
    table_rows,
)
from applications.mri.figures import draw_image
from applications.mri.files import write_whole
from applications.mri.keeping import Keeper, Report, describe
from applications.mri.network import Architecture, light, paper
from applications.mri.phantoms import SimulationSettings, make_place, simulate_folder
from applications.mri.reconstruction import Network
from applications.mri.sampling import (
    CartesianEquispaced,
    CartesianRandom,
    PoissonDisc,
    Radial,
    Sampling,
)
from applications.mri.training import TrainingSettings, train
from applications.mri.weights import Trained, load_weights
from bilevel.errors import BilevelError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Multi-coil MRI reconstruction without coil sensitivities, trained by multipliers.",
)
console = Console()


class Mask(StrEnum):
    """Samplings by name."""

    RANDOM = "random"
    EQUISPACED = "equispaced"
    POISSON = "poisson"
    RADIAL = "radial"


MaskOption = Annotated[Mask, typer.Option(help="Sampling pattern.")]
Acceleration = Annotated[
    float | None, typer.Option(help="All positions over measured ones; 4, for poisson 8.")
]
Centre = Annotated[
    float | None, typer.Option(help="random, equispaced: fully sampled share of columns; 0.08.")
]
Spokes = Annotated[int | None, typer.Option(help="radial: number of spokes; 32.")]
Seed = Annotated[int, typer.Option(help="Of everything that is random.")]
Weights = Annotated[Path, typer.Option(help="Trained weights, safetensors.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to torch.")]


def main() -> None:
    """Run the command line."""
    app()


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can mend are one line and exit code 2; Ctrl-C is exit code 130."""

    @wraps(command)
    def run(**arguments: object) -> None:
        try:
            command(**arguments)
        except BilevelError as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: the files that were written are complete.\n")
            raise typer.Exit(130) from None

    return run


@app.command()
@_guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for figure, results and weights.")],
    seconds: Annotated[float, typer.Option(help="Seconds to train.", min=1.0)] = 211.0,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Simulate, train, evaluate and reconstruct a real scan, all on bundled data."""
    _use(threads)
    with _progress() as report:
        found = run_demo(out, DemoSettings(seconds, seed), report)
    _print(found.evaluation, "Held-out slices, Cartesian random 4 x, mean over anatomies")
    console.print(f"Figure   {found.figure}")
    console.print(f"Results  {found.results}")
    console.print(f"Weights  {found.weights}")
    console.print(f"All of it took {found.seconds:.0f} s.")


@app.command()
@_guarded
def simulate(
    out: Annotated[Path, typer.Option(help="Folder for train/, validation/ and test/.")],
    size: Annotated[int, typer.Option(help="Rows and columns.", min=16)] = 128,
    coils: Annotated[int, typer.Option(help="Receive coils.", min=1)] = 8,
    noise: Annotated[float, typer.Option(help="Noise in units of image magnitude.", min=0)] = 0.01,
    repeats: Annotated[int, typer.Option(help="Training volumes an anatomy.", min=1)] = 1,
    anatomies: Annotated[Path | None, typer.Option(help="HDF5 of magnitude images.")] = None,
    seed: Seed = 0,
) -> None:
    """Write fully sampled multi-coil scans of magnitude images, in the layout of fastMRI."""
    settings = SimulationSettings(size, coils, noise, repeats, seed, anatomies)
    with _progress() as report:
        files = simulate_folder(out, settings, lambda k, n: report("simulating scans", k / n))
    for role, paths in files.items():
        console.print(f"{role}: {len(paths)} files in {out / role}")


@app.command(name="train")
@_guarded
def train_command(
    data: Annotated[Path, typer.Option(help="Folder of fully sampled .h5 scans.")],
    out: Annotated[Path, typer.Option(help="Weights to write, safetensors.")],
    preset: Annotated[str, typer.Option(help="Network: paper or light.")] = "light",
    init: Annotated[Path | None, typer.Option(help="Weights to begin with.")] = None,
    mask: MaskOption = Mask.RANDOM,
    acceleration: Acceleration = None,
    center: Centre = None,
    spokes: Spokes = None,
    steps: Annotated[int | None, typer.Option(help="Updates at most.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds at most.", min=1)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam at its peak.")] = 3e-3,
    crop: Annotated[int, typer.Option(help="Rows of a training crop, 0: none.", min=0)] = 32,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Train a network by Algorithm 2; Ctrl-C leaves the last complete weights."""
    _use(threads)
    slices = SliceDataset(data)
    make_place(out)
    trained = _begin(preset, init, slices, seed)
    settings = TrainingSettings(
        samplings=(
            _sampling(mask, acceleration=acceleration, center_fraction=center, spokes=spokes),
        ),
        steps=steps if steps or seconds else 1000,
        seconds=seconds,
        learning_rate=learning_rate,
        crop=crop,
        seed=seed,
    )
    with _progress() as report:
        keeper = Keeper(out, trained.network, describe(settings), report)
        with keeper:
            found = train(trained.network, trained.control, slices, settings, keeper)
    keeper.save(found.control)
    mean = sum(found.costs[-20:]) / len(found.costs[-20:])
    console.print(
        f"{len(found.costs)} updates in {found.seconds:.0f} s, mean loss of the last 20: {mean:.4g}"
    )
    console.print(f"Weights  {out}")


@app.command(name="evaluate")
@_guarded
def evaluate_command(
    data: Annotated[Path, typer.Option(help="Folder of fully sampled .h5 scans.")],
    weights: Weights,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    baselines: Annotated[
        Path | None, typer.Option(help="Folder of validation scans to tune SigPy's methods on.")
    ] = None,
    mask: MaskOption = Mask.RANDOM,
    acceleration: Acceleration = None,
    center: Centre = None,
    spokes: Spokes = None,
    seed: Seed = 2,
    threads: Threads = 0,
) -> None:
    """Score a network, and the classical methods if they can be tuned, on the same masks."""
    _use(threads)
    trained = load_weights(weights)
    slices = SliceDataset(data)
    make_place(out)
    sampling = _sampling(mask, acceleration=acceleration, center_fraction=center, spokes=spokes)
    with _progress() as report:
        swept = {}
        if baselines is not None:
            report("tuning the baselines", 0.0)
            swept = sweep_regularisation(SliceDataset(baselines), sampling, seed + 1)
        methods = classical_methods(swept) | network_methods(trained)
        found = evaluate(methods, slices, sampling, seed, lambda k, n: report("evaluating", k / n))
    content = {"weights": str(weights), "sampling": repr(sampling), "seed": seed}
    write_whole(out, json.dumps(content | found.as_json(), indent=1).encode())
    _print(found, f"{len(slices.files)} volumes of {data}")
    console.print(f"Results  {out}")


@app.command()
@_guarded
def reconstruct(
    scan: Annotated[Path, typer.Option(help="HDF5 in the layout of fastMRI, undersampled.")],
    weights: Weights,
    out: Annotated[Path, typer.Option(help="HDF5 to write: dataset `reconstruction`.")],
    png: Annotated[Path | None, typer.Option(help="The middle slice as a picture.")] = None,
    threads: Threads = 0,
) -> None:
    """Reconstruct the slices of a scan; the mask is the file's, or what was measured."""
    _use(threads)
    trained, file = load_weights(weights), VolumeFile(scan)
    make_place(out)
    if png is not None:
        make_place(png)
    images: list[torch.Tensor] = []
    with _progress() as report:
        for index in range(file.n_slices):
            images.append(_reconstructed(trained, file.read_slice(index)))
            report("reconstructing", (index + 1) / file.n_slices)
    buffer = BytesIO()
    with h5py.File(buffer, "w") as written:
        written["reconstruction"] = torch.stack(images).numpy()
        written.attrs["source"] = scan.name
        written.attrs["weights"] = weights.name
    write_whole(out, buffer.getvalue())
    if png is not None:
        draw_image(png, images[len(images) // 2])
    console.print(f"Images   {out}")


def _reconstructed(trained: Trained, one: Slice) -> torch.Tensor:
    """The image of a slice; an error names the file."""
    try:
        mask = implied_mask(one.kspace) if one.mask is None else one.mask
        scan = trained.network.prepare(one.kspace[None], mask)
    except InputError as error:
        raise InputError(f"{one.path}: {error}") from error
    return trained.network.reconstruct(scan, trained.control).image[0]


def _begin(preset: str, init: Path | None, slices: SliceDataset, seed: int) -> Trained:
    if init is not None:
        return load_weights(init)
    presets: dict[str, Callable[[int], Architecture]] = {"paper": paper, "light": light}
    if preset not in presets:
        raise InputError(f"preset must be one of {', '.join(presets)}, got {preset!r}.")
    network = Network(presets[preset](slices.files[0].n_coils), seed)
    return Trained(network, network.controls(), {})


def _sampling(mask: Mask, **options: float | None) -> Sampling:
    """The sampling of a name; an option that it does not have is an error, not ignored."""
    kind = {
        Mask.RANDOM: CartesianRandom,
        Mask.EQUISPACED: CartesianEquispaced,
        Mask.POISSON: PoissonDisc,
        Mask.RADIAL: Radial,
    }[mask]
    given = {name: value for name, value in options.items() if value is not None}
    fitting = {field.name for field in fields(kind)}
    for name in sorted(given.keys() - fitting):
        flag = {"center_fraction": "center"}.get(name, name)
        raise InputError(f"--{flag} does not belong to --mask {mask}; leave it out.")
    return kind(**given)


def _use(threads: int) -> None:
    if threads > 0:
        torch.set_num_threads(threads)


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar a stage, on the screen while it is worked on."""
    columns: list[Any] = [
        TextColumn("{task.description:28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                for other in tasks.values():
                    progress.update(other, completed=1.0)
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)

        yield report


def _print(evaluation: Evaluation, title: str) -> None:
    table = Table(title=title)
    for name in ("method", "PSNR [dB]", "gain [dB]", "SSIM", "NMSE", "s / slice"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in table_rows(evaluation):
        table.add_row(*row)
    console.print(table)
