r"""Learned weights of training tasks, against what one would do without them.

A linear softmax model is trained on the weighted losses of N small tasks, of which some are of no
use. The weights are learned on little validation data: one weight a task for one model
(`TaskWeights(N)`), or one for each pair of training and validation task, with a model a validation
task (`TaskWeights(N, M)`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from applications.keeping import Clock, Kept, finished, solving
from applications.records import Report
from applications.toy import models
from applications.toy.data import load
from applications.toy.models import Model, Params, penalty, start
from applications.toy.task_results import Learned, Result, Run, Settings
from applications.toy.tasks import Samples, Tasks, make_tasks

Losses = Callable[[Params, object], Tensor]


def run_task_weights(settings: Settings, report: Report, kept: Kept | None = None) -> Result:
    """Learn task weights for several seeds, and compare.

    Args:
        settings: of the experiment.
        report: told of the share that is done.
        kept: where descents and finished seeds are kept; what was interrupted there goes on.

    Returns:
        Weights and accuracies.

    Raises:
        InputError: if the data cannot be read or are too few.
        DivergenceError: if a descent diverges.
    """
    data = load(settings.data)

    def tasks_of(seed: int) -> Tasks:
        return make_tasks(data, settings.tasks, torch.Generator().manual_seed(seed))

    def run(k: int) -> Run:
        def done(share: float) -> None:
            report("learning weights", (k + share) / settings.seeds)

        seed = settings.seed + k
        part = None if kept is None else kept.part(f"seed-{seed}-descents")
        return _Experiment(tasks_of(seed), settings, part).run(seed, done)

    runs = tuple(
        finished(kept, f"seed-{settings.seed + k}", partial(run, k)) for k in range(settings.seeds)
    )
    first = tasks_of(settings.seed)  # names and relation are the same for all seeds
    return Result(
        settings, data.name, first.train.names, first.validation.names, first.related, runs
    )


class _Experiment:
    """One seed: the model, its losses, and every way to train it."""

    def __init__(self, tasks: Tasks, settings: Settings, kept: Kept | None) -> None:
        self.tasks, self.settings, self.kept = tasks, settings, kept
        inputs = tasks.train.inputs.flatten(0, 1)
        begin = start(Model.LINEAR, inputs.shape[1], tasks.n_classes, 0, torch.Generator())
        self.start = {name: x.double() for name, x in begin.items()}
        # The Hessian of the cross-entropy in the logits is at most 1/2.
        squared = float(torch.linalg.matrix_norm(inputs, 2)) ** 2 / len(inputs) + 1
        self.optimizer = bl.optim.SGD(1 / (squared / 2 + settings.decay), momentum=0.9)

    def decayed(self, samples: Samples) -> Losses:
        """The loss of each task, with weight decay."""
        decay = self.settings.decay
        return lambda params, _: losses(params, samples) + penalty(params, decay)

    def solver(self, weights: bl.TaskWeights) -> bl.BilevelSolver:
        problem = bl.weighted_problem(
            self.decayed(self.tasks.train),
            lambda params, _: losses(params, self.tasks.validation),
            weights,
        )
        settings = self.settings
        return bl.BilevelSolver(
            problem,
            self.optimizer,
            settings.inner_steps,
            settings.method.chosen,
            certificate=None,
            on_failure="ignore",
        )

    def learn(self, weights: bl.TaskWeights, done: Callable[[float], None]) -> Learned:
        """Weights by bilevel descent; the hypergradient where it ends is judged."""
        settings, solver, clock = self.settings, self.solver(weights), Clock()
        form = "vector" if weights.n_validations is None else "matrix"
        solution = solver.solve(
            weights.stacked(self.start),
            weights.initial(torch.float64),
            lambda control: torch.optim.Adam(control, settings.learning_rate),
            steps=settings.updates,
            callback=lambda progress: done(progress.step / settings.updates),
            **solving(self.kept, form, also=clock),
        )
        seconds = clock.seconds
        judged = replace(
            solver,
            inner_steps=settings.fit_steps,
            certificate=bl.AgainstMinimiser(max_products=500),
        ).hypergradient(solution.params, solution.control)
        sigma = weights.sigma(solution.control)
        related = self.tasks.related
        mass = (
            sigma[related.any(1)].sum()
            if sigma.ndim == 1
            else torch.where(related, sigma, 0).sum(0)
        )
        estimate = judged.certificate.error_estimate if judged.certificate else float("inf")
        return Learned(sigma, mass, solution.values, estimate, seconds)

    def fit(self, samples: Samples, sigma: Tensor) -> Params:
        """One model for each column of weights, all trained alike, stacked."""
        k = sigma.shape[1]
        each, columns = self.decayed(samples), bl.Vmapped()
        return bl.adapt(
            self.optimizer,
            bl.TaskWeights(1, k).stacked(self.start),
            lambda params: (sigma.T * columns.losses(each, params, None, k)).sum(),
            self.settings.fit_steps,
        )

    def adapted(self, joint: Params, sigma: Tensor) -> Params:
        """Step (4) of Algorithm 1: the joint model towards each training task, by its weight."""
        each = self.decayed(self.tasks.train)
        found = [
            bl.adapt(
                self.optimizer,
                joint,
                lambda params, i=i: each(params, None)[i],
                self.settings.adapt_steps,
                weight=float(weight),
            )
            for i, weight in enumerate(sigma)
        ]
        return {name: torch.stack([one[name] for one in found]) for name in joint}

    def best(self, stacked: Params) -> Params:
        """For each validation task, the model of least validation loss."""
        return chosen(stacked, table(losses, stacked, self.tasks.validation).argmin(0))

    def run(self, seed: int, done: Callable[[float], None]) -> Run:
        """Learn both forms of weights, and train in every way."""
        tasks = self.tasks
        n, m = tasks.related.shape
        entropy = self.settings.entropy
        vector = self.learn(bl.TaskWeights(n, entropy=entropy), lambda s: done(0.4 * s))
        matrix = self.learn(bl.TaskWeights(n, m, entropy=entropy), lambda s: done(0.4 + 0.4 * s))
        uniform = torch.full((n, 1), 1 / n, dtype=torch.float64)
        oracle = tasks.related / tasks.related.sum(0)
        columns = [uniform, torch.eye(n).double(), vector.sigma[:, None], matrix.sigma, oracle]
        fitted = self.fit(tasks.train, torch.cat(columns, 1))
        widths = [part.shape[1] for part in columns]
        parts = {name: stack.split(widths) for name, stack in fitted.items()}
        of_uniform, singles, of_vector, of_matrix, of_oracle = (
            {name: stacks[i] for name, stacks in parts.items()} for i in range(len(columns))
        )
        done(0.9)
        adapted = self.adapted({name: x[0] for name, x in of_vector.items()}, vector.sigma)
        every = torch.zeros(m, dtype=torch.int64)  # one model for all validation tasks
        ways = {
            "uniform weights": chosen(of_uniform, every),
            "best single task": self.best(singles),
            "validation data only": self.fit(tasks.validation, torch.eye(m).double()),
            "learned vector": chosen(of_vector, every),
            "learned vector, adapted": self.best(adapted),
            "learned matrix": of_matrix,
            "oracle": of_oracle,
        }
        done(1.0)
        found = {way: table(accuracies, p, tasks.test).diagonal() for way, p in ways.items()}
        return Run(seed, vector, matrix, found)


def losses(params: Params, samples: Samples) -> Tensor:
    """Mean cross-entropy of each task, shape ``(tasks,)``."""
    inputs, labels = samples.inputs.flatten(0, 1), samples.labels.flatten()
    return models.losses(params, inputs, labels).reshape(samples.labels.shape).mean(1)


def accuracies(params: Params, samples: Samples) -> Tensor:
    """Share of samples of each task that are classified right, shape ``(tasks,)``."""
    return (models.logits(params, samples.inputs).argmax(-1) == samples.labels).double().mean(1)


def table(
    measure: Callable[[Params, Samples], Tensor], stacked: Params, samples: Samples
) -> Tensor:
    """What each of several stacked models has on each task, shape ``(models, tasks)``."""
    count = stacked["bias"].shape[0]
    return torch.stack(
        [measure({name: x[k] for name, x in stacked.items()}, samples) for k in range(count)]
    )


def chosen(stacked: Params, which: Tensor) -> Params:
    """Some of several stacked models, stacked."""
    return {name: x[which] for name, x in stacked.items()}
