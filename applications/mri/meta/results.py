"""What is compared in meta-training, and what was found, as records and plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

import bilevel as bl
from applications.errors import InputError
from applications.mri.evaluation.metrics import Scores, mean_scores
from applications.mri.meta.learning import Learned
from applications.mri.meta.settings import Ablation, MetaSettings
from applications.mri.tasks.task_facts import TaskFacts
from applications.records import describe, machine, spread
from applications.settings import Written, setting

Table = dict[str, dict[str, Scores]]  # by model, by test task


def _ablations(text: str) -> tuple[Ablation, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list(Ablation):
            raise InputError(f"--ablations must be some of {','.join(Ablation)}, got {name!r}.")
    return tuple(Ablation(name) for name in names)


@dataclass(frozen=True)
class ExperimentSettings:
    """What is compared, and how it is scored.

    Attributes:
        training: of every way, its seed that of the first run.
        ablations: the ways.
        seeds: runs, each with minibatches, and weights to begin with, of its own.
        adapt_steps: of the models towards each training task, step (4) of Algorithm 1; 0: none.
        adapt_slices: of a task that it is adapted on.

    Raises:
        InputError: if there is no way or no seed, or a number is negative.
    """

    training: MetaSettings
    ablations: tuple[Ablation, ...] = setting(
        tuple(Ablation),
        f"Ways to weigh tasks: {','.join(Ablation)}.",
        written=Written(str, ",".join(Ablation), _ablations),
    )
    seeds: int = setting(1, "Runs.", least=1)
    adapt_steps: int = setting(0, "Of the model towards each training task; 0: none.", least=0)
    adapt_slices: int = setting(4, "That it is adapted on.", least=1)

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.ablations or len(set(self.ablations)) < len(self.ablations):
            raise InputError(
                "ablations must be one or more, each once, got "
                f"{','.join(self.ablations) or 'none'}."
            )
        if self.seeds < 1 or self.adapt_steps < 0 or self.adapt_slices < 1:
            raise InputError(
                "seeds and adapt_slices must be at least 1 and adapt_steps at least 0, got "
                f"{self.seeds}, {self.adapt_slices} and {self.adapt_steps}."
            )


@dataclass(frozen=True, eq=False)
class Run:
    """One training.

    Attributes:
        ablation: how tasks were weighed.
        seed: of it.
        learned: models and task weights.
        scores: on the test slices, by model and task.
        adapted: of the models adapted to training tasks, by task.
        adapted_models: their weights, by task.
    """

    ablation: Ablation
    seed: int
    learned: Learned
    scores: Table
    adapted: dict[str, Scores]
    adapted_models: dict[str, bl.PerStep]

    def own(self, task: str) -> Scores:
        """Of the model that is for a task."""
        return self.scores[self.model_of(task)][task]

    def model_of(self, task: str) -> str:
        """Which model is for a task: its own, or the one for all."""
        return task if task in self.learned.models else "all"


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything.

    Attributes:
        settings: of it.
        architecture: of the network.
        facts: of the tasks.
        trained: names of the N training tasks.
        validated: names of the M validation tasks.
        tested: names of the validation tasks with test slices, over which means are taken.
        zero_filled: scores without a network, by test task.
        runs: by ablation, then seed; those made so far.
    """

    settings: ExperimentSettings
    architecture: dict[str, Any]
    facts: tuple[TaskFacts, ...]
    trained: tuple[str, ...]
    validated: tuple[str, ...]
    tested: tuple[str, ...]
    zero_filled: dict[str, Scores]
    runs: tuple[Run, ...]

    def of(self, ablation: Ablation) -> list[Run]:
        """The runs of one way, one a seed."""
        return [run for run in self.runs if run.ablation == ablation]

    def means(self, ablation: Ablation) -> list[Scores]:
        """Mean over `tested` of each seed."""
        return [mean_scores(run.own(name) for name in self.tested) for run in self.of(ablation)]

    def correlation(self, ablation: Ablation) -> bl.tasks.Correlation:
        """Learned weights, in the mean over seeds."""
        sigma = torch.stack([run.learned.sigma for run in self.of(ablation)]).mean(0)
        columns = self.validated if sigma.ndim == 2 else ("all",)
        return bl.tasks.Correlation(sigma.reshape(len(self.trained), -1), self.trained, columns)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        summary = {
            ablation: {
                measure: {"mean": fmean(values), "spread": spread(values)}
                for measure in ("psnr", "ssim")
                for values in [[getattr(one, measure) for one in self.means(ablation)]]
            }
            for ablation in self.settings.ablations
            if self.tested and self.of(ablation)
        }
        settings = describe(self.settings.training) | {
            name: value for name, value in vars(self.settings).items() if name != "training"
        }
        return {
            "settings": settings,
            "architecture": self.architecture,
            "tasks": [one.as_json() for one in self.facts],
            "train": self.trained,
            "validation": self.validated,
            "test": self.tested,
            "summary": summary,
            "zero_filled": _plain(self.zero_filled),
            "runs": [_run_json(run, self.correlation_of(run)) for run in self.runs],
            "machine": machine(),
        }

    def correlation_of(self, run: Run) -> dict[str, dict[str, float]]:
        """The learned correlation by training task and validation task."""
        sigma = run.learned.sigma.reshape(len(self.trained), -1).tolist()
        columns = self.validated if run.learned.sigma.ndim == 2 else ("all",)
        return {
            task: dict(zip(columns, row, strict=True))
            for task, row in zip(self.trained, sigma, strict=True)
        }


def with_spread(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, and their spread where there are several."""
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {spread(values):.{digits}f}" if len(values) > 1 else mean


def _plain(scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
    return {name: vars(one) for name, one in scores.items()}


def _run_json(run: Run, correlation: dict[str, dict[str, float]]) -> dict[str, Any]:
    learned = run.learned
    return {
        "ablation": run.ablation,
        "seed": run.seed,
        "alpha": learned.alpha.tolist(),
        "sigma": learned.sigma.tolist(),
        "correlation": correlation,
        "scores": {model: _plain(scores) for model, scores in run.scores.items()},
        "adapted": _plain(run.adapted),
        "values": learned.values,
        "updates": learned.updates,
        "inner_steps": learned.inner_steps,
        "evaluations": learned.evaluations,
        "seconds": learned.seconds,
    }
