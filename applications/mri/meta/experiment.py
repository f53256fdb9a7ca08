"""Meta-training in every way and for several seeds, scored on the test slices of all tasks."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import bilevel as bl
from applications.files import make_folder, write_json
from applications.keeping import Kept, finished
from applications.mri.evaluation.baselines import zero_filled
from applications.mri.evaluation.methods import Method as Reconstructing, network_methods
from applications.mri.evaluation.metrics import Scores
from applications.mri.evaluation.scoring import evaluate
from applications.mri.meta.learning import Learned, learn
from applications.mri.meta.losses import TaskLosses
from applications.mri.meta.results import Experiment, ExperimentSettings, Run
from applications.mri.meta.settings import Ablation, MetaSettings
from applications.mri.meta.solvers import meta_solver
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, on_device, save_weights
from applications.mri.tasks.task_facts import TaskFacts
from applications.mri.tasks.tasks import Task, Tasks, file_name
from applications.mri.training.draws import Minibatches
from applications.mri.training.examples import PreparedExample
from applications.records import Report, describe

RECORDS = (Run, Learned, Scores, bl.PerStep, bl.TaskWeights, bl.Softmax)  # of finished trainings


def run_meta(
    tasks: Tasks,
    facts: tuple[TaskFacts, ...],
    begin: Callable[[int], Trained],
    out: Path,
    settings: ExperimentSettings,
    report: Report,
    kept: Kept | None = None,
) -> Experiment:
    """Trains in every way and scores.

    After each training its weights are in ``out/weights`` and its scores in ``out/results.json``.

    Args:
        tasks: to train, validate and test on.
        facts: of them.
        begin: the network of a seed, with the weights to begin with.
        out: folder, made if need be.
        settings: what is compared.
        report: told of progress.
        kept: where trainings are kept; what was interrupted there goes on.

    Returns:
        Everything that was found.

    Raises:
        InputError: if a scan cannot be used, or a file not be written.
        DivergenceError: if a training diverges.
    """
    folder = make_folder(out / "weights")
    first = settings.training.seed
    trained = begin(first)
    tested = tasks.of("test")
    zero: Reconstructing = lambda kspace, _mask: zero_filled(kspace)  # noqa: E731
    without = {task.name: score_on(task, zero, first) for task in tested}
    validated = tuple(task.name for task in tasks.of("validation"))
    found = Experiment(
        settings,
        asdict(trained.network.architecture),
        facts,
        tuple(task.name for task in tasks.of("train")),
        validated,
        tuple(task.name for task in tested if task.name in validated),
        without,
        (),
    )
    for ablation in settings.ablations:
        for seed in range(first, first + settings.seeds):
            begun, stage = begin(seed), partial(report, f"{ablation}, seed {seed}")
            name = f"{ablation}-{seed}"
            part = None if kept is None else kept.part(f"{name}-training")
            make = partial(_run, ablation, seed, begun, tasks, settings, stage, part)
            run = finished(kept, name, make)
            _save(folder, run, begun, settings)
            found = replace(found, runs=(*found.runs, run))
            write_json(out / "results.json", found.as_json())
    return found


def _run(
    ablation: Ablation,
    seed: int,
    begun: Trained,
    tasks: Tasks,
    settings: ExperimentSettings,
    report: Callable[[float], None],
    kept: Kept | None,
) -> Run:
    training = replace(settings.training, seed=seed)
    learned = learn(ablation, begun.network, begun.control, tasks, training, report, kept)
    masks = settings.training.seed  # the same for all seeds, so that spreads are those of training

    def score(control: bl.PerStep, task: Task) -> Scores:
        return score_on(task, network_methods(replace(begun, control=control))["ours"], masks)

    scores = {
        model: {task.name: score(control, task) for task in tasks.of("test")}
        for model, control in learned.models.items()
    }
    adapted = (
        adapt_models(begun, learned, tasks, training, settings) if settings.adapt_steps else {}
    )
    after = {
        task.name: score(adapted[task.name], task)
        for task in tasks.of("test")
        if task.name in adapted
    }
    return Run(ablation, seed, learned, scores, after, adapted)


def adapt_models(
    begun: Trained,
    learned: Learned,
    tasks: Tasks,
    training: MetaSettings,
    settings: ExperimentSettings,
) -> dict[str, bl.PerStep]:
    """Step (4) of Algorithm 1: towards each training task, the step size times its weight.

    Args:
        begun: the network.
        learned: models and weights. Of a matrix, only training tasks that are also validated on
            have a model to begin with.
        tasks: all.
        training: how steps are made; the rate is the one at the end of the warm-up.
        settings: how many steps, on how many slices.

    Returns:
        The models by task.
    """
    validated = [task.name for task in tasks.of("validation")]
    batches = Minibatches(
        begun.network,
        tasks.sources("train", training.seed),
        "train",
        settings.adapt_slices,
        seed=training.seed,
        device=training.device,
    )
    found: dict[str, bl.PerStep] = {}
    for i, task in enumerate(tasks.of("train")):
        model = learned.models.get(task.name, learned.models.get("all"))
        if model is None:
            continue
        sigma = learned.sigma[i]
        weight = sigma[validated.index(task.name)] if sigma.ndim else sigma
        examples, steps = batches.of_source(i, 0), settings.adapt_steps
        weight = max(float(weight), 1e-6)  # 0, which Sparsemax and rounding know, is no step size
        found[task.name] = adapted(begun.network, model, examples, training, steps, weight)
    return found


def adapted(
    network: Network,
    model: bl.PerStep,
    examples: Sequence[PreparedExample],
    training: MetaSettings,
    steps: int,
    weight: float = 1.0,
) -> bl.PerStep:
    """A model after some steps on some slices of a task.

    Args:
        network: its dynamics.
        model: to begin with.
        examples: the slices, all of them in every step, on the device of the training.
        training: rule, rate and loss of the steps.
        steps: how many.
        weight: times the rate.

    Returns:
        The weights of the adapted model, on the CPU.
    """
    losses = TaskLosses(network, training.loss, training.checkpointing)
    solver = meta_solver(losses, bl.TaskWeights(1), training, training.learning_rate)
    loss = partial(losses.of_task, examples=examples)
    begun = on_device(model, training.device)
    return on_device(bl.adapt(solver.optimizer, begun, loss, steps, weight=weight), "cpu")


def score_on(task: Task, method: Reconstructing, seed: int) -> Scores:
    """Scores on the test slices of a task, in the mean over volumes.

    Args:
        task: with test slices.
        method: what reconstructs.
        seed: the masks depend on it.

    Returns:
        The scores.
    """
    name = "one"
    return evaluate({name: method}, task.parts["test"], task.sampling, seed + 2).mean[name]


def _save(folder: Path, run: Run, begun: Trained, settings: ExperimentSettings) -> None:
    """One file a model, by way and seed."""
    record = {
        "training": describe(settings.training) | {"seed": run.seed},
        "ablation": run.ablation,
        "sigma": run.learned.sigma.tolist(),
    }
    models = run.learned.models | {f"adapted-{n}": one for n, one in run.adapted_models.items()}
    for name, control in models.items():
        place = folder / f"{run.ablation}-{run.seed}-{file_name(name)}.safetensors"
        save_weights(place, Trained(begun.network, control, record | {"model": name}))
