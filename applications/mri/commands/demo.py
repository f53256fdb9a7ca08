"""The main job on the bundled data: simulate, evaluate, check, score a measured scan; or train."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import Threads, console, progress_bars, use_threads
from applications.files import make_folder, write_json
from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.commands.demo_figure import draw, shown
from applications.mri.commands.shared import print_checks, print_scores
from applications.mri.data import SliceDataset
from applications.mri.evaluation.methods import (
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.scoring import Evaluation, evaluate
from applications.mri.network.architecture import light
from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import PRETRAINED, WEIGHTS, Trained, pretrained
from applications.mri.sampling import CartesianRandom
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder
from applications.mri.training.keeping import Keeper
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import train
from applications.outputs import PICTURE, Output, claimed, results
from applications.records import Report, describe, machine
from applications.settings import setting

_N_COILS = 8  # of the simulation
_FIGURE, _RESULTS, _WEIGHTS = "figure.png", "results.json", "weights.safetensors"
_SAMPLING = CartesianRandom(4.0, 0.08)  # evaluated and drawn, and trained for
_MEASURED_SAMPLING = CartesianRandom(2.0, 0.16)  # of the measured scan, which has two coils


@dataclass(frozen=True)
class DemoSettings:
    """The demo's few choices.

    Attributes:
        seconds: of training a network of its own [s]; None takes the bundled weights.
        seed: of everything.
        size: rows and columns of the simulated slices.
    """

    seconds: float | None = setting(
        None, "Train a network of its own so long, instead of the bundled weights.", least=1
    )
    seed: int = setting(0, "Of everything that is random.")
    size: int = setting(128, "Rows and columns of the simulation.", least=32)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo found, besides the files it wrote.

    Attributes:
        evaluation: of all methods on the held-out slices.
        measured: of the measured scan, which is fully sampled, undersampled twice.
        certificates: what the check says of each held-out slice, by name.
        figure: PNG.
        results: JSON.
        weights: safetensors, or None if nothing was trained.
        seconds: all of it [s].
    """

    evaluation: Evaluation
    measured: Evaluation
    certificates: dict[str, SliceCertificate]
    figure: Path
    results: Path
    weights: Path | None
    seconds: float


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for figure, results and weights.")],
    settings: DemoSettings,
    threads: Threads = 0,
) -> None:
    """Simulate scans of true phase, evaluate, check, and score a measured scan; bundled data."""
    use_threads(threads)
    written = [
        Output(out / _FIGURE, PICTURE),
        Output(out / _RESULTS, results("evaluation", "regularisation")),
        *([] if settings.seconds is None else [Output(out / _WEIGHTS, WEIGHTS)]),
    ]
    with claimed(written, folder=out), progress_bars() as report:
        found = run_demo(out, settings, report)
    print_scores(found.evaluation, "Held-out slices, Cartesian random 4 x, mean over anatomies")
    print_scores(found.measured, "Measured phantom, 2 coils, Cartesian random 2 x")
    print_checks(found.certificates)
    console.print(f"Figure   {found.figure}")
    console.print(f"Results  {found.results}")
    if found.weights is not None:
        console.print(f"Weights  {found.weights}")
    console.print(f"All of it took {found.seconds:.0f} s.")


def run_demo(out: Path, settings: DemoSettings, report: Report) -> DemoResult:
    """Simulate, perhaps train, evaluate, reconstruct, draw.

    Args:
        out: folder for everything, made if need be.
        settings: the choices.
        report: told of progress.

    Returns:
        Scores and files.

    Raises:
        InputError: if the folder cannot be written.
    """
    started = time.monotonic()
    make_folder(out)
    simulation = SimulationSettings(
        settings.size, _N_COILS, seed=settings.seed, local_phase=1.0, reference="measured"
    )
    files = simulate_folder(
        out / "data", simulation, lambda done, n: report("simulating scans", done / n)
    )
    data = {role: SliceDataset(paths) for role, paths in files.items()}
    if settings.seconds is None:
        trained, about = pretrained(), {"weights": PRETRAINED}
    else:
        trained, about = _trained(out, data["train"], settings, settings.seconds, report)

    report("tuning the baselines", 0.0)
    swept = sweep_regularisation(data["validation"], _SAMPLING, settings.seed + 1)
    methods = classical_methods(swept) | network_methods(trained)
    evaluation = evaluate(
        methods,
        data["test"],
        _SAMPLING,
        settings.seed + 2,
        lambda done, n: report("evaluating held-out slices", done / n),
    )
    scan = SliceDataset([bundled_scan_path()])
    measured = evaluate(methods, scan, _MEASURED_SAMPLING, settings.seed + 2)
    slices = shown(data["test"], _SAMPLING, settings.seed + 2)
    certificates = {}
    for k, one in enumerate(slices):
        report("checking held-out slices", k / len(slices))
        certificates[one.file.path.stem] = one.certificate(trained)
    report("drawing", 0.0)
    figure = out / _FIGURE
    phantom = shown(scan, _MEASURED_SAMPLING, settings.seed + 2)
    draw(figure, trained, methods, slices, phantom, settings.seed)
    report("drawing", 1.0)
    seconds = time.monotonic() - started
    place = out / _RESULTS
    content = {
        "settings": asdict(settings) | {"simulation": describe(simulation)},
        "training": about,
        "regularisation": {name: vars(one) for name, one in swept.items()},
        "evaluation": evaluation.as_json(),
        "measured": measured.as_json(),
        "checks": {name: one.as_json() for name, one in certificates.items()},
        "machine": machine(),
        "seconds": seconds,
    }
    write_json(place, content)
    weights = None if settings.seconds is None else out / _WEIGHTS
    return DemoResult(evaluation, measured, certificates, figure, place, weights, seconds)


def _trained(
    out: Path, slices: SliceDataset, settings: DemoSettings, seconds: float, report: Report
) -> tuple[Trained, dict[str, object]]:
    """A network trained from nothing, saved, and how it was trained."""
    training = TrainingSettings(
        samplings=(_SAMPLING,), seconds=seconds, whole=0.1, seed=settings.seed
    )
    network = Network(light(), settings.seed)
    keeper = Keeper(out / _WEIGHTS, network, {"training": describe(training)}, report)
    with keeper:
        found = train(network, network.controls(), slices, training, keeper)
    keeper.save(found.control)
    spent = {"updates": len(found.costs), "seconds_spent": found.seconds, "costs": found.costs}
    return Trained(network, found.control, {}), describe(training) | spent
