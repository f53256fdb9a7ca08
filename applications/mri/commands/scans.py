"""The commands that write and read scans: `simulate`, `reconstruct` and `evaluate`."""

import filecmp
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import Seed, Threads, console, progress_bars, say, use_threads
from applications.errors import InputError
from applications.files import write_json
from applications.mri.commands.reports import Job, Outcome, print_images, print_outcomes
from applications.mri.commands.shared import print_scores
from applications.mri.data import FORMATS, SliceDataset, examined, open_scan, scans_in
from applications.mri.data.coil_fits import changes, coil_fits
from applications.mri.data.images import SUFFIXES, check_image_path
from applications.mri.evaluation.baselines import Sweep
from applications.mri.evaluation.figures import draw_image
from applications.mri.evaluation.kept import KeptImages, names_of
from applications.mri.evaluation.methods import (
    BART,
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.metrics import Convention
from applications.mri.evaluation.scanning import Checks, Making, reconstruct_scan
from applications.mri.evaluation.scoring import evaluate
from applications.mri.formats.fastmri import SUFFIXES as HDF5
from applications.mri.network.weights import PRETRAINED, weights_named
from applications.mri.sampling import FromFile, Masking, Sampling
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder
from applications.mri.training.precision import check_device
from applications.outputs import Output, check_outputs, claimed, results
from applications.records import Report

VERDICTS = results(records={"scans": ("scan", "images")})
SCORES = results("convention", "mean", "volumes")
Weights = Annotated[
    str, typer.Option(help="Trained weights, a safetensors file; or pretrained, the bundled ones.")
]
Device = Annotated[str, typer.Option(help="Where the network works, cpu or cuda.")]


class ReconstructionMethod(StrEnum):
    """What makes images of a scan."""

    NETWORK = "network"
    L1_SPIRIT = "l1-spirit"


def simulate_command(
    out: Annotated[Path, typer.Option(help="Folder for train/, validation/ and test/.")],
    settings: SimulationSettings,
) -> None:
    """Write fully sampled multi-coil scans of magnitude images, in the layout of fastMRI."""
    with claimed([], folder=out), progress_bars() as report:
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
        typer.Option(
            help="Folder of validation scans, others than --data, to tune classical methods on."
        ),
    ] = None,
    metrics: Annotated[
        Convention, typer.Option(help="Range and errors over the volume, or over each slice.")
    ] = Convention.FASTMRI,
    images: Annotated[
        Path | None, typer.Option(help="Folder for images and error maps of every volume.")
    ] = None,
    device: Device = "cpu",
    seed: Seed = 2,
    threads: Threads = 0,
) -> None:
    """Score a network, and the classical methods if they can be tuned, on the same masks."""
    use_threads(threads)
    check_device(device)
    trained, slices = weights_named(weights), SliceDataset(data)
    tuned_on = None if baselines is None else SliceDataset(baselines)
    if tuned_on is not None:
        _check_apart(slices, tuned_on)
    sampling = masking.sampling
    kept = None if images is None else KeptImages(images, slices.files)
    written = [] if kept is None else kept.outputs
    inputs = [*_files(slices), *_files(tuned_on), *_weights_files(weights)]
    check_outputs([Output(out, SCORES), *written], inputs)
    with claimed([Output(out, SCORES)], inputs, images), progress_bars() as report:
        looked = examined(slices, report=lambda share: report("looking at scans", share))
        for line in looked.remarks:
            say(line)
        for change in changes(coil_fits(looked.slices.files, trained.network.architecture.n_coils)):
            console.print(change)
        swept = {} if tuned_on is None else _tuned(tuned_on, sampling, seed + 1, report)
        methods = classical_methods(swept) | network_methods(trained, device)
        found = evaluate(
            methods,
            looked.slices,
            sampling,
            seed,
            lambda k, n: report("evaluating", k / n),
            metrics,
            kept,
        )
        content = {"weights": weights, "sampling": repr(sampling), "seed": seed}
        content |= {"remarks": looked.remarks}
        write_json(out, content | found.as_json())
    print_scores(found, f"{len(slices.files)} volumes of {data}")
    console.print(f"Results  {out}")
    if images is not None:
        console.print(f"Images   {images}")


def _tuned(slices: SliceDataset, sampling: Sampling, seed: int, report: Report) -> dict[str, Sweep]:
    report("tuning the baselines", 0.0)
    swept = sweep_regularisation(examined(slices).slices, sampling, seed)
    if BART not in swept:
        console.print("BART is not installed: its l1-wavelet with two maps is left out.")
    return swept


def reconstruct_command(
    scan: Annotated[
        Path,
        typer.Option(
            help="Undersampled scan: fastMRI's HDF5, ISMRMRD, Siemens' .dat, BART's .cfl, or what "
            "the names of M4Raw's repetitions have in common; or a folder of scans."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Images to write: .h5, .nii or .nii.gz; of a folder a folder.")
    ],
    checks: Annotated[Checks, "Checks"],
    method: Annotated[
        ReconstructionMethod,
        typer.Option(help="The network of --weights; or l1-spirit, which needs no training."),
    ] = ReconstructionMethod.NETWORK,
    weights: Weights = PRETRAINED,
    png: Annotated[
        Path | None, typer.Option(help="The middle slice as a picture; of a folder a folder.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="File of a mask within what was measured: .npy, .npz, .h5, .cfl, .png."),
    ] = None,
    suffix: Annotated[str, typer.Option(help="Of the images of a folder.")] = ".h5",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on where a scan of a folder cannot be used.")
    ] = False,
    verdicts: Annotated[
        Path | None, typer.Option("--json", help="JSON file of what became of each slice.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Reconstruct all slices; the mask is the one given, the scan's, or what was measured."""
    use_threads(threads)
    check_device(device)
    learned = method is ReconstructionMethod.NETWORK
    making = Making(weights_named(weights) if learned else None, checks, device)
    made_by = {"weights": Path(weights).name} if learned else {"method": method.value}
    given = None if mask is None else FromFile(mask)
    several = scan.is_dir()
    jobs = _jobs(scan, out, png, suffix, check=not skip_bad) if several else [Job(scan, out, png)]
    inputs = [*(one.scan for one in jobs), *_weights_files(weights), *([mask] if mask else [])]
    written = [] if verdicts is None else [Output(verdicts, VERDICTS)]
    held = claimed(written, inputs, out) if several else claimed(written, inputs)
    skip = several and skip_bad
    with held, progress_bars() as report:
        check_outputs([*written, *(one for job in jobs for one in job.outputs)], inputs)
        for job in jobs:
            check_image_path(job.out)
        outcomes = [_outcome(job, making, given, made_by, report, skip, inputs) for job in jobs]
        if verdicts is not None:
            write_json(verdicts, {"scans": [one.as_json() for one in outcomes]})
    if several:
        print_outcomes(outcomes, out)
    else:
        print_images(outcomes[0])


def _outcome(
    job: Job,
    making: Making,
    given: FromFile | None,
    made_by: dict[str, str],
    report: Report,
    skip: bool,
    inputs: list[Path],
) -> Outcome:
    """What becomes of a scan; where it may be skipped, an error is an outcome."""
    record = {"source": job.scan.name} | made_by
    told = partial(report, f"reconstructing {job.scan.name}")
    try:
        with claimed(job.outputs, inputs):
            found = reconstruct_scan(job.scan, making, job.out, given, told, record)
            if job.png is not None:
                draw_image(job.png, found.middle)
    except InputError as error:
        if not skip:
            raise
        return Outcome(job, error)
    return Outcome(job, found)


def _jobs(scan: Path, out: Path, png: Path | None, suffix: str, *, check: bool) -> list[Job]:
    """The scans of a folder and the images to write; opens the scans before any work."""
    if out.name.endswith(SUFFIXES):
        raise InputError(
            f"{out}: images of a folder of scans go to a folder, this is the name of a file; "
            "choose the format by --suffix."
        )
    check_image_path(out / f"image{suffix}")
    if Path(suffix).name != suffix:
        raise InputError(
            f"--suffix must be the end of a name, such as .nii.gz, got {suffix!r}; name the folder "
            "by --out."
        )
    scans = [one for one in scans_in(scan, (*HDF5, ".mrd", ".cfl", ".dat")) if _plausible(one)]
    if not scans:
        raise InputError(f"{scan}: at least one scan was needed, the folder has none.")
    for one in scans if check else ():
        open_scan(one)
    return [
        Job(one, out / f"{name}{suffix}", None if png is None else png / f"{name}.png")
        for one, name in zip(scans, names_of(scans), strict=True)
    ]


def _plausible(path: Path) -> bool:
    """Whether a file of a folder is meant as a scan: many things are called .dat."""
    return path.suffix.lower() != ".dat" or any(one.recognises(path) for one in FORMATS)


def _check_apart(slices: SliceDataset, tuned_on: SliceDataset) -> None:
    """Refuses to tune methods on scans that they are scored on, copies included."""
    scored: dict[tuple[int, bytes], list[Path]] = {}
    for one in _files(slices):
        scored.setdefault(_mark(one), []).append(one)
    for other in _files(tuned_on):
        for one in scored.get(_mark(other), []):
            if filecmp.cmp(one, other, shallow=False):
                raise InputError(
                    f"{other}: methods must be tuned on other scans than they are scored on, this "
                    f"is {one} of --data; name a folder of validation scans."
                )


def _mark(path: Path) -> tuple[int, bytes]:
    """What files of the same content share, and few others: size, and values from the middle."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size // 2)
        return size, file.read(4096)


def _files(slices: SliceDataset | None) -> list[Path]:
    return [] if slices is None else [file.path for file in slices.files]


def _weights_files(weights: str) -> list[Path]:
    return [] if weights == PRETRAINED else [Path(weights)]
