"""What training on one task is worth on another, and how fast models adapt to unseen ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import bilevel as bl
from applications.errors import InputError
from applications.inputs import content, reading
from applications.keeping import Kept, finished
from applications.mri.evaluation.methods import network_methods
from applications.mri.evaluation.metrics import Scores
from applications.mri.meta.experiment import adapted, score_on
from applications.mri.meta.learning import learn
from applications.mri.meta.results import Table
from applications.mri.meta.settings import Ablation
from applications.mri.meta.transfer_results import Transfer, TransferSettings
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights
from applications.mri.tasks.tasks import Task, Tasks, check_names, file_name
from applications.mri.training.draws import Minibatches
from applications.records import Report

RECORDS = (Scores,)  # of finished parts
_MOST_BYTES = 2**28  # of a file of results
_RESULTS = "a file of results of meta-train", "give its folder"


def measure_transfer(
    tasks: Tasks,
    unseen: Sequence[Task],
    begun: Trained,
    models: Mapping[str, bl.PerStep],
    settings: TransferSettings,
    report: Report,
    learned: dict[str, dict[str, float]] | None = None,
    kept: Kept | None = None,
) -> Transfer:
    """Trains a model on each training task alone, and scores all models on all tasks.

    Args:
        tasks: seen by training.
        unseen: others; their test slices are scored, their training slices adapted on.
        begun: the network, with the weights to begin with.
        models: further ones to score and to adapt, such as those of meta-training.
        settings: what is measured.
        report: told of progress.
        learned: correlation to compare with.
        kept: where trainings and scores are kept; what was interrupted there goes on.

    Returns:
        Scores and curves.

    Raises:
        InputError: if names come twice, or there are no test slices.
        DivergenceError: if a training diverges.
    """
    scored = [task for task in (*tasks.every, *unseen) if "test" in task.parts]
    trained = tasks.of("train")
    check_names(task.name for task in (*tasks.every, *unseen))
    check_names([*(task.name for task in trained), *models])
    if not scored:
        raise InputError("at least one task with the role test was needed, got none; add it.")
    every = _trained_alone(tasks, begun, settings, report, kept) | dict(models)
    scores: Table = {}
    curves: dict[str, dict[str, dict[int, Scores]]] = {}
    for i, (name, model) in enumerate(every.items()):
        report("scoring and adapting", i / len(every))
        make = partial(_measured, scored, begun, model, settings)
        scores[name], curves[name] = finished(kept, f"scores-{file_name(name)}", make)
    report("scoring and adapting", 1.0)
    names = tuple(task.name for task in trained)
    seen = tuple(task.name for task in tasks.of("test"))
    others = tuple(task.name for task in unseen if "test" in task.parts)
    return Transfer(settings, names, seen, others, scores, curves, learned)


def _measured(
    tasks: Sequence[Task], begun: Trained, model: bl.PerStep, settings: TransferSettings
) -> tuple[dict[str, Scores], dict[str, dict[int, Scores]]]:
    """Scores of a model on tasks, and its curves on those that it can adapt to."""
    scores = {task.name: _scored(task, begun, model, settings) for task in tasks}
    adaptable = [task for task in tasks if "train" in task.parts]
    return scores, {task.name: _curve(task, begun, model, settings) for task in adaptable}


def _trained_alone(
    tasks: Tasks, begun: Trained, settings: TransferSettings, report: Report, kept: Kept | None
) -> dict[str, bl.PerStep]:
    """A model of each training task, by its name."""
    every: dict[str, bl.PerStep] = {}
    validation = tasks.of("validation")[0].parts["validation"]  # which equal weights never read
    for task in tasks.of("train"):
        alone = Tasks((replace(task, parts={**task.parts, "validation": validation}),))
        share = partial(report, f"training on {task.name}")
        part = None if kept is None else kept.part(f"alone-{file_name(task.name)}")
        given = begun.network, begun.control, alone, settings.training, share
        found = learn(Ablation.UNIFORM, *given, part)
        every[task.name] = found.models["all"]
    return every


def _scored(task: Task, begun: Trained, model: bl.PerStep, settings: TransferSettings) -> Scores:
    method = network_methods(Trained(begun.network, model, {}))["ours"]
    return score_on(task, method, settings.training.seed)


def _curve(
    task: Task, begun: Trained, model: bl.PerStep, settings: TransferSettings
) -> dict[int, Scores]:
    training = settings.training
    batches = Minibatches(
        begun.network,
        (task.source("train", training.seed),),
        "train",
        settings.slices,
        seed=training.seed,
        device=training.device,
    )
    examples = batches.of_source(0, 0)
    found = {}
    for steps in settings.steps:
        moved = adapted(begun.network, model, examples, training, steps)
        found[steps] = _scored(task, begun, moved, settings)
    return found


def learned_correlation(path: Path) -> dict[str, dict[str, float]]:
    """The correlation that `meta-train` wrote: of a matrix, else of a vector, mean over seeds.

    Args:
        path: its results.json.

    Returns:
        By training task, by validation task.

    Raises:
        InputError: if the file is not of that kind, or holds neither.
    """
    runs, validated = _runs(path)
    for way in (Ablation.MATRIX, Ablation.VECTOR):
        tables = [table for (name, _), table in runs.items() if name == way]
        if tables:
            with reading(path, *_RESULTS):
                return {
                    task: {
                        name: fmean(
                            table[task].get(name, table[task].get("all")) for table in tables
                        )
                        for name in validated
                    }
                    for task in tables[0]
                }
    raise InputError(
        f"{path}: learned weights were needed, a matrix or a vector, got "
        f"{', '.join(sorted({name for name, _ in runs})) or 'none'}; train them."
    )


def _runs(path: Path) -> tuple[dict[tuple[str, int], Any], list[str]]:
    """Correlations by way and seed, and the names of the validation tasks."""
    text = content(path, _RESULTS[0], _MOST_BYTES)
    with reading(path, *_RESULTS):
        found = json.loads(text)
        runs = {(run["ablation"], run["seed"]): run["correlation"] for run in found["runs"]}
        validated = found["validation"]
        for table in runs.values():
            numbers = [row.get(n, row.get("all")) for row in table.values() for n in validated]
            if not all(type(one) in {int, float} and 0 <= one <= 1 + 1e-6 for one in numbers):
                raise ValueError("'correlation' of each run must hold numbers in 0 to 1")
        return runs, validated


def meta_models(folder: Path) -> tuple[Network, dict[str, bl.PerStep]]:
    """The models that `meta-train` wrote, those of its first seed.

    Args:
        folder: what it was given as `--out`.

    Returns:
        The network, and models by the way they were trained.

    Raises:
        InputError: if there is none, or a file cannot be read.
    """
    loaded = [load_weights(path) for path in sorted((folder / "weights").glob("*.safetensors"))]
    meant = [one for one in loaded if "ablation" in one.record]
    if not meant:
        raise InputError(
            f"{folder}: weights of meta-train were needed in {folder / 'weights'}, got none; give "
            "the folder that it wrote."
        )
    models: dict[str, bl.PerStep] = {}
    with reading(folder, "weights with the records of meta-train", "give the folder that it wrote"):
        first = min(int(one.record["training"]["seed"]) for one in meant)
        for one in meant:
            way, name = one.record["ablation"], one.record["model"]
            if one.record["training"]["seed"] == first and not name.startswith("adapted-"):
                models[f"meta, {way}" + ("" if name == "all" else f", {name}")] = one.control
    return meant[0].network, models
