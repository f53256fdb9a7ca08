"""The main job on the bundled data: simulate, train, evaluate, reconstruct a real scan, draw."""

import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import bilevel as bl
from applications.command_line import Report
from applications.files import make_folder, write_json
from applications.mri.anatomy import bundled_scan_path
from applications.mri.data import SliceDataset, VolumeFile, fully_sampled, implied_mask
from applications.mri.evaluation import (
    Evaluation,
    Method,
    classical_methods,
    evaluate,
    network_methods,
    sweep_regularisation,
)
from applications.mri.figures import Panel, draw_reconstructions
from applications.mri.keeping import Keeper, describe
from applications.mri.network import light
from applications.mri.operators import ifft2c, rss
from applications.mri.phantoms import SimulationSettings, simulate_folder
from applications.mri.reconstruction import Loss, Network
from applications.mri.sampling import CartesianRandom, acceleration_of
from applications.mri.training import TrainingSettings, train
from applications.mri.weights import Trained

_N_COILS = 8  # of the bundled scan
_SAMPLING = CartesianRandom(4.0, 0.08)  # trained for, evaluated and drawn
_SHOWN = (
    "brain_t1_axial",
    "neck_t2star_axial",
)  # where the object is small, and where it fills the view


@dataclass(frozen=True)
class DemoSettings:
    """The demo's few choices.

    Attributes:
        seconds: of training [s].
        seed: of everything.
        size: rows and columns of the simulated slices.
    """

    seconds: float = 211.0
    seed: int = 0
    size: int = 128


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo found, besides the files it wrote.

    Attributes:
        evaluation: of all methods on the held-out slices.
        figure: PNG.
        results: JSON.
        weights: safetensors.
        seconds: all of it [s].
    """

    evaluation: Evaluation
    figure: Path
    results: Path
    weights: Path
    seconds: float


def run_demo(out: Path, settings: DemoSettings, report: Report) -> DemoResult:
    """Simulate, train, evaluate, reconstruct, draw.

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
    training = TrainingSettings(
        samplings=(_SAMPLING,),
        seconds=settings.seconds,
        crop=min(32, settings.size),
        whole=0.1,
        seed=settings.seed,
    )
    network = Network(light(_N_COILS), settings.seed)
    weights = out / "weights.safetensors"
    keeper = Keeper(weights, network, {"training": describe(training)}, report)
    with keeper:
        trained_for = train(network, network.controls(), data["train"], training, keeper)
    keeper.finish(trained_for.control)
    trained = Trained(network, trained_for.control, {})

    report("tuning the baselines", 0.0)
    swept = sweep_regularisation(data["validation"], _SAMPLING, settings.seed + 1)
    methods = {
        **classical_methods(swept),
        **network_methods(trained),
    }
    evaluation = evaluate(
        methods,
        data["test"],
        _SAMPLING,
        settings.seed + 2,
        lambda done, n: report("evaluating held-out slices", done / n),
    )
    report("drawing", 0.0)
    figure = out / "figure.png"
    _draw(figure, trained, methods, data["test"], settings)
    report("drawing", 1.0)
    seconds = time.monotonic() - started
    results = out / "results.json"
    content = {
        "settings": asdict(settings) | {"simulation": describe(simulation)},
        "training": describe(training)
        | {"updates": len(trained_for.costs), "seconds_spent": trained_for.seconds},
        "costs": trained_for.costs,
        "regularisation": {name: vars(one) for name, one in swept.items()},
        "evaluation": evaluation.as_json(),
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()}
        | {"processor": platform.processor() or platform.machine()},
        "seconds": seconds,
    }
    write_json(results, content)
    return DemoResult(evaluation, figure, results, weights, seconds)


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
    return [rss(one)[0] for one in found.multipliers or []]


def _draw(
    path: Path,
    trained: Trained,
    methods: dict[str, Method],
    test: SliceDataset,
    settings: DemoSettings,
) -> None:
    shown = {name: methods[name] for name in ("zero-filled", "l1-wavelet", "ours")}
    generator = torch.Generator().manual_seed(settings.seed + 2)  # the masks of the evaluation
    masks = [_SAMPLING.mask(file.shape, generator) for file in test.files]
    panels: list[Panel] = []
    chosen = [i for i, f in enumerate(test.files) if f.path.stem in _SHOWN] or [0]
    for i in chosen:
        file, mask = test.files[i], masks[i]
        one = file.read_slice(0)
        undersampled = one.kspace * mask
        images = {name: method(undersampled, mask) for name, method in shown.items()}
        title = f"{file.path.stem}, {acceleration_of(mask):.1f} x"
        panels.append(Panel(title, images, one.reference))
    scan = VolumeFile(bundled_scan_path()).read_slice(0)
    mask = implied_mask(scan.kspace)
    images = {name: method(scan.kspace, mask) for name, method in shown.items()}
    real = Panel(f"real scan, {acceleration_of(mask):.1f} x", images)
    multipliers = swept_multipliers(trained, test.files[chosen[0]], 0, masks[chosen[0]])
    title = (
        "Held-out slices, a real scan, and the multipliers of the training loss at the first slice"
    )
    draw_reconstructions(path, panels, real, multipliers, title)
