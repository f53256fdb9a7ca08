r"""Data hyper-cleaning: one learned weight for each training sample, of which many are mislabelled.

.. math::
    \min_\alpha \frac{1}{|V|} \sum_{j \in V} l_j(\theta(\alpha)) \quad \text{where} \quad
    \theta(\alpha) = \arg\min_\theta
    \frac{2}{n} \sum_i \mathrm{sigmoid}(\alpha_i)\, l_i(\theta) + \frac{\delta}{2} \|\theta\|^2

Weights start at one half, alpha = 0. Franceschi et al. 2017, Forward and reverse gradient-based
hyperparameter optimization, arXiv 1703.01785, section 5.1, introduced the task; there the model is
judged as it is trained on the weighted samples alone. Here it is then trained again, on weighted
and validation samples together, and compared with what validation samples give without any
cleaning.

Validation data alone choose everything: one part is the outer objective, the other, held out,
chooses the weight decay of each way of training and when to stop. Then all of it is trained on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl
from applications.command_line import Report
from applications.errors import InputError
from applications.toy.cleaning import CLEANED, CleaningResult, CleaningRun, CleaningSettings
from applications.toy.data import Corrupted, Dataset, corrupt, load, split
from applications.toy.metrics import judge
from applications.toy.models import Params, accuracy, fit, losses, penalty, start


def run_hyper_cleaning(settings: CleaningSettings, report: Report) -> CleaningResult:
    """Learn weights of samples for several seeds, and compare.

    Args:
        settings: of the experiment.
        report: told of the share that is done.

    Returns:
        Weights, their verdicts and accuracies.

    Raises:
        InputError: if the data cannot be read or are too few.
        DivergenceError: if a descent diverges.
    """
    data = load(settings.data)
    runs = []
    for k in range(settings.seeds):

        def done(share: float, k: int = k) -> None:
            report("cleaning", (k + share) / settings.seeds)

        runs.append(_Experiment(data, settings, settings.seed + k).run(done))
    return CleaningResult(settings, data.name, tuple(runs))


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A model of one way of training, and what chose it."""

    params: Params
    decay: float
    loss: float  # on held-out data


class _Experiment:
    """One seed: its data, the descent, and every way to train."""

    def __init__(self, data: Dataset, settings: CleaningSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        generator = torch.Generator().manual_seed(seed)
        self.clean, self.validation, self.test = split(data, settings.parts, generator)
        self.noisy: Corrupted = corrupt(self.clean, settings.share, settings.convention, generator)
        n = len(self.validation)
        if n < 2:
            raise InputError(f"2 validation samples were needed, one held out, got {n}; take more.")
        self.n_outer = n - max(1, n // 5)
        self.outer = self.validation[: self.n_outer]
        self.held = self.validation[self.n_outer :]
        self.start = start(
            settings.model, data.inputs.shape[1], data.n_classes, settings.hidden, generator
        )

    def solver(self) -> bl.BilevelSolver:
        """The bilevel problem of the weights, and how it is solved."""
        noisy, outer, settings = self.noisy.data, self.outer, self.settings
        # The Hessian of the cross-entropy in the logits is at most 1/2, twice a weight at most 2.
        squared = float(torch.linalg.matrix_norm(noisy.inputs, 2)) ** 2 / len(noisy) + 1

        def inner(params: Params, alpha: Tensor, _batch: object) -> Tensor:
            each = losses(params, noisy.inputs, noisy.labels)
            return 2 * (alpha.sigmoid() * each).mean() + penalty(params, settings.learning_decay)

        return bl.BilevelSolver(
            bl.BilevelProblem(
                inner, lambda params, _alpha, _batch: losses(params, *_pair(outer)).mean()
            ),
            bl.HeavyBall(1 / (squared + settings.learning_decay)),
            settings.inner_steps,
            settings.method.chosen,
            certificate=None,
            on_failure="ignore",
        )

    def tuned(
        self,
        parts: Sequence[tuple[Dataset, Tensor]],
        begin: Params,
        decays: Sequence[float] | None = None,
    ) -> _Fitted:
        """The fit to weighted data, with the decay that is best on held-out data."""
        inputs = torch.cat([data.inputs for data, _ in parts])
        labels = torch.cat([data.labels for data, _ in parts])
        weights = torch.cat([weights for _, weights in parts])
        found: list[_Fitted] = []
        for decay in decays or self.settings.decays:  # from large to small: each begins at the last
            begin = fit(begin, inputs, labels, weights, decay, self.settings.fit_steps)
            found.append(_Fitted(begin, decay, float(losses(begin, *_pair(self.held)).mean())))
        return min(found, key=lambda one: one.loss)

    def trained(self, train: Dataset | None, weights: Tensor, *, validated: bool) -> _Fitted:
        """A way of training: the decay is chosen with held-out data, then they are trained on."""
        begin = [] if train is None else [(train, weights)]
        chosen = self.tuned(begin + ([_whole(self.outer)] if validated else []), self.start)
        if not validated:
            return chosen
        return self.tuned([*begin, _whole(self.validation)], chosen.params, [chosen.decay])

    def learn(self, done: Callable[[float], None]) -> tuple[Tensor, bl.Solution, int, float]:
        """Weights by bilevel descent, those of the look that was best on held-out data."""
        settings, solver = self.settings, self.solver()
        noisy, n = self.noisy.data, len(self.noisy.data)
        looks: list[tuple[float, int, Tensor]] = []
        paused = 0.0

        def look(progress: bl.Progress) -> None:
            nonlocal paused
            done(progress.step / settings.updates)
            if progress.step % settings.every and progress.step != settings.updates:
                return
            began = time.perf_counter()
            weights = progress.control.sigmoid().clone()
            found = self.tuned([(noisy, weights), _whole(self.outer)], self.start)
            looks.append((found.loss, progress.step, weights))
            paused += time.perf_counter() - began

        begin = fit(
            self.start,
            *_pair(noisy),
            torch.ones(n),
            settings.learning_decay,
            settings.fit_steps,
        )
        began = time.perf_counter()
        solution = solver.solve(
            begin,
            torch.zeros(n),
            lambda alpha: torch.optim.SGD(alpha, settings.rate * n, momentum=0.9),
            steps=settings.updates,
            callback=look,
        )
        seconds = time.perf_counter() - began - paused
        _, step, weights = min(looks, key=lambda one: one[0])
        return weights, solution, step, seconds

    def run(self, done: Callable[[float], None]) -> CleaningRun:
        """Learn the weights, and train in every way."""
        weights, solution, updates, seconds = self.learn(lambda s: done(0.5 * s))
        noisy, wrong = self.noisy.data, self.noisy.wrong
        ones = torch.ones(len(noisy))
        ways = {
            "noisy only": (noisy, ones, False),
            "validation only": (None, ones, True),
            "noisy and validation": (noisy, ones, True),
            CLEANED: (noisy, weights, True),
            "wrong labels dropped": (noisy, (~wrong).float(), True),
            "oracle": (self.clean, ones, True),
        }
        fitted = {}
        for k, (way, (train, each, validated)) in enumerate(ways.items(), 1):
            fitted[way] = self.trained(train, each, validated=validated)
            done(0.5 + 0.5 * k / len(ways))
        return CleaningRun(
            self.seed,
            weights,
            wrong,
            judge(weights, wrong),
            solution.values,
            updates,
            {way: accuracy(one.params, *_pair(self.test)) for way, one in fitted.items()},
            {way: one.decay for way, one in fitted.items()},
            seconds,
        )


def _pair(data: Dataset) -> tuple[Tensor, Tensor]:
    return data.inputs, data.labels


def _whole(data: Dataset) -> tuple[Dataset, Tensor]:
    """Data with weights one."""
    return data, torch.ones(len(data))
