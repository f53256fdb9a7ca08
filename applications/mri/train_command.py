"""The command `train`: what is written on the command line, as settings."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import bilevel as bl
from applications.command_line import Seed, Threads, progress_bars, use_threads
from applications.errors import InputError
from applications.files import make_place
from applications.mri.choices import (
    Acceleration,
    Calibration,
    Centre,
    MaskOption,
    Spokes,
    Width,
    chosen_sampling,
)
from applications.mri.data import SliceDataset
from applications.mri.keeping import Keeper, describe
from applications.mri.network import preset_named
from applications.mri.precision import Precision
from applications.mri.reconstruction import Network
from applications.mri.resuming import StateFile
from applications.mri.schedules import Constant, Cosine, Schedule, Step
from applications.mri.self_supervised import SelfSupervision
from applications.mri.tensorboard import tensorboard
from applications.mri.training import TrainingSettings, TrainingState, train
from applications.mri.validation import Validation
from applications.mri.weights import Trained, load_weights

console = Console()
_SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "cosine": Cosine,
    "constant": Constant,
    "step": Step,
}


def train_command(
    data: Annotated[Path, typer.Option(help="Folder of .h5 scans, fully sampled.")],
    out: Annotated[Path, typer.Option(help="Weights to write, safetensors.")],
    preset: Annotated[str, typer.Option(help="Network: paper or light.")] = "light",
    init: Annotated[Path | None, typer.Option(help="Weights to begin with.")] = None,
    mask: MaskOption = "random",
    acceleration: Acceleration = None,
    center: Centre = None,
    calibration: Calibration = None,
    width: Width = None,
    spokes: Spokes = None,
    self_supervised: Annotated[
        bool,
        typer.Option(
            "--self-supervised",
            help="Scans are undersampled: hold out a part of their samples, outside a central "
            "square of --calibration.",
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Updates at most.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds at most.", min=1)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam at its peak.")] = 3e-3,
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rate: {', '.join(_SCHEDULES)}.")
    ] = "cosine",
    accumulate: Annotated[int, typer.Option(help="Slices an update.", min=1)] = 1,
    crop: Annotated[int, typer.Option(help="Rows of a training crop, 0: none.", min=0)] = 32,
    validation: Annotated[
        Path | None, typer.Option(help="Folder of scans to choose the best weights by.")
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Updates between looks at them; 100.", min=1)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without gain.", min=1)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory of a sweep, such as '500 MiB'.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[
        Precision, typer.Option(help="Of the convolutions; bfloat16 needs a GPU.")
    ] = Precision.FLOAT32,
    board: Annotated[
        Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted training of --out.")
    ] = False,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Train a network by Algorithm 2; Ctrl-C leaves the weights and the state of the training."""
    use_threads(threads)
    masking = {
        "acceleration": acceleration,
        "center_fraction": center,
        "calibration": calibration,
        "width": width,
        "spokes": spokes,
    }
    settings = TrainingSettings(
        **_sampled(mask, masking, self_supervised=self_supervised),
        steps=steps if steps or seconds else 1000,
        seconds=seconds,
        learning_rate=learning_rate,
        schedule=_named("schedule", _SCHEDULES, schedule)(),
        accumulate=accumulate,
        crop=crop,
        validation=_looks(validation, validate_every, patience),
        checkpointing=bl.Checkpointing() if budget is None else bl.Budget(budget),
        device=device,
        precision=precision,
        seed=seed,
    )
    slices = SliceDataset(data)
    looked_at = None if validation is None else SliceDataset(validation)
    make_place(out)
    trained = _begin(preset, init, slices, seed)
    conditions = describe(settings) | {"data": _contents(slices), "validated": _contents(looked_at)}
    state = StateFile(out.with_name(f"{out.name}.state"), trained.network, conditions)
    begin = state.load() if resume else trained.control
    with ExitStack() as stack:
        record = None if board is None else stack.enter_context(tensorboard(board))
        report = stack.enter_context(progress_bars(console))
        keeper = Keeper(out, trained.network, describe(settings), report, state)
        stack.enter_context(keeper)

        def after_step(told: TrainingState) -> None:
            if record is not None:
                record(told)
            keeper(told)

        found = train(trained.network, begin, slices, settings, after_step, looked_at)
        keeper.finish(found.control)
    mean = sum(found.costs[-20:]) / len(found.costs[-20:])
    console.print(
        f"{len(found.costs)} updates in {found.seconds:.0f} s, mean loss of the last 20: {mean:.4g}"
    )
    if found.looks:
        best = min(found.looks, key=lambda look: look.cost)
        early = ", stopped by patience" if found.stopped else ""
        console.print(f"Least validation loss {best.cost:.4g} after update {best.step}{early}")
    console.print(f"Weights  {out}")


def _sampled(
    mask: str, masking: dict[str, float | None], *, self_supervised: bool
) -> dict[str, Any]:
    if not self_supervised:
        return {"samplings": (chosen_sampling(mask, **masking),)}
    given = {name for name, value in masking.items() if value is not None}
    if mask != "random" or given - {"calibration"}:
        raise InputError(
            "--self-supervised takes the mask of each scan, got options of another mask; leave "
            "--mask and its settings out, except for --calibration, the square that is not split."
        )
    centre = masking["calibration"]
    supervision = SelfSupervision() if centre is None else SelfSupervision(centre=int(centre))
    return {"self_supervision": supervision}


def _looks(folder: Path | None, every: int | None, patience: int | None) -> Validation:
    if folder is None and not (every is None and patience is None):
        raise InputError(
            "--validate-every and --patience need scans to look at, got no --validation; name a "
            "folder of them, or leave both out."
        )
    return Validation(patience=patience) if every is None else Validation(every, patience)


def _named(option: str, known: dict[str, Any], name: str) -> Any:
    if name not in known:
        raise InputError(f"{option} must be one of {', '.join(known)}, got {name!r}.")
    return known[name]


def _contents(slices: SliceDataset | None) -> list[tuple[str, int]]:
    return [] if slices is None else [(file.path.name, file.n_slices) for file in slices.files]


def _begin(preset: str, init: Path | None, slices: SliceDataset, seed: int) -> Trained:
    if init is not None:
        return load_weights(init)
    network = Network(preset_named(preset, slices.files[0].n_coils), seed)
    return Trained(network, network.controls(), {})
