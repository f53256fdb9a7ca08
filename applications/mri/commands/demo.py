"""The main job on the bundled data: simulate, evaluate, score a measured scan, draw; or train."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import bilevel as bl
from applications.command_line import Threads, console, progress_bars, use_threads
from applications.files import make_folder, write_json
from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.commands.shared import print_scores
from applications.mri.data import SliceDataset, VolumeFile, fully_sampled
from applications.mri.evaluation.figures import Panel, draw_reconstructions
from applications.mri.evaluation.methods import (
    L1_SPIRIT,
    Method,
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.scoring import Evaluation, evaluate
from applications.mri.network.architecture import light
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.weights import PRETRAINED, WEIGHTS, Trained, pretrained
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import ifft2c, rss
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
_SHOWN = ("brain_t1_axial", "head_wrapped_t1_coronal")  # within the view, and folding over


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
        figure: PNG.
        results: JSON.
        weights: safetensors, or None if nothing was trained.
        seconds: all of it [s].
    """

    evaluation: Evaluation
    measured: Evaluation
    figure: Path
    results: Path
    weights: Path | None
    seconds: float


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for figure, results and weights.")],
    settings: DemoSettings,
    threads: Threads = 0,
) -> None:
    """Simulate, evaluate and reconstruct a measured scan, all on bundled data."""
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
    simulation = SimulationSettings(settings.size, _N_COILS, seed=settings.seed)
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
    report("drawing", 0.0)
    figure = out / _FIGURE
    _draw(figure, trained, methods, data["test"], scan, settings)
    report("drawing", 1.0)
    seconds = time.monotonic() - started
    place = out / _RESULTS
    content = {
        "settings": asdict(settings) | {"simulation": describe(simulation)},
        "training": about,
        "regularisation": {name: vars(one) for name, one in swept.items()},
        "evaluation": evaluation.as_json(),
        "measured": measured.as_json(),
        "machine": machine(),
        "seconds": seconds,
    }
    write_json(place, content)
    weights = None if settings.seconds is None else out / _WEIGHTS
    return DemoResult(evaluation, measured, figure, place, weights, seconds)


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
    keeper.finish(found.control)
    spent = {"updates": len(found.costs), "seconds_spent": found.seconds, "costs": found.costs}
    return Trained(network, found.control, {}), describe(training) | spent


def swept_multipliers(trained: Trained, file: VolumeFile, index: int, mask: Tensor) -> list[Tensor]:
    """Magnitudes of lambda_0, ..., lambda_T of the training loss for one slice.

    Args:
        trained: network and weights.
        file: fully sampled scan.
        index: slice.
        mask: undersamples it.

    Returns:
        Root sums of squares over the coils, each ``(rows, columns)``.
    """
    kspace, reference = fully_sampled(file.read_slice(index))
    network = trained.network
    scan = network.prepare(kspace[None], mask)
    problem, start = network.training_problem(scan, ifft2c(kspace)[None], reference[None], Loss())
    found = bl.adjoint(problem, start, trained.control, keep_multipliers=True)
    return [rss(network.coil_images(one))[0] for one in found.multipliers or []]


def _draw(
    path: Path,
    trained: Trained,
    methods: dict[str, Method],
    test: SliceDataset,
    measured: SliceDataset,
    settings: DemoSettings,
) -> None:
    shown = {name: methods[name] for name in ("zero-filled", L1_SPIRIT, "ours")}
    panels: list[Panel] = []
    drawn: list[Tensor] = []
    chosen = [i for i, f in enumerate(test.files) if f.path.stem in _SHOWN] or [0]
    for slices, sampling, which in (
        (test, _SAMPLING, chosen),
        (measured, _MEASURED_SAMPLING, [0]),
    ):
        generator = torch.Generator().manual_seed(settings.seed + 2)  # the masks of the evaluation
        masks = [sampling.mask(file.shape, generator) for file in slices.files]
        for i in which:
            kspace, reference = fully_sampled(slices.files[i].read_slice(0))
            undersampled = kspace * masks[i]
            images = {name: method(undersampled, masks[i]) for name, method in shown.items()}
            title = f"{slices.files[i].path.stem}, {acceleration_of(masks[i]):.1f} x"
            panels.append(Panel(title, images, reference))
            drawn.append(masks[i])
    multipliers = swept_multipliers(trained, test.files[chosen[0]], 0, drawn[0])
    title = "Held-out slices, a measured scan, and the multipliers of the loss at the first slice"
    every = max(1, (len(multipliers) - 1) // 4)  # five of them
    draw_reconstructions(path, panels, dict(list(enumerate(multipliers))[::every]), title)
