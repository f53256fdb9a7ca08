r"""Data hyper-cleaning: one learned weight for each training sample, of which many are mislabelled.

.. math::
    \min_\alpha \sum_k \sum_{j \in V_k} l_j(\theta_k(\alpha)) \quad \text{where} \quad
    \theta_k(\alpha) = \arg\min_\theta
    \sum_i \mathrm{sigmoid}(\alpha_i)\, l_i(\theta) + \sum_{j \in V \setminus V_k} l_j(\theta)
    + \frac{c \delta}{2} \|\theta\|^2

Weights start at one half, alpha = 0; c is the sum of all weights then. Each fold :math:`V_k` of the
validation samples judges a model that is trained on the other folds too, as the final model will
be. Franceschi et al. 2017, Forward and reverse gradient-based hyperparameter optimization, arXiv
1703.01785, section 5.1, introduced the task; there all of V judges a model that is trained on the
weighted samples alone, and this model is the result. Here the result is trained again, on weighted
and validation samples together, and compared with what validation samples give without any
cleaning.

Validation data alone choose everything: one part is V, the other, held out, chooses the updates of
the weights and, for each way of training, the weight decay and the steps. Then all of it is trained
on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.keeping import Clock, Kept, finished, solving
from applications.records import Report
from applications.settings import Method
from applications.toy.cleaning import CLEANED, CleaningResult, CleaningRun, CleaningSettings, judge
from applications.toy.data import Corrupted, Dataset, corrupt, load_apart, split
from applications.toy.models import Params, accuracy, fit, fits, losses, objective, start

_LOOK = 10  # steps of a fit between two looks at held-out data
_PATIENCE = 30  # steps without gain that end a fit


def run_hyper_cleaning(
    settings: CleaningSettings, report: Report, kept: Kept | None = None
) -> CleaningResult:
    """Learn weights of samples for several seeds, and compare.

    Args:
        settings: of the experiment.
        report: told of the share that is done.
        kept: where descents and finished seeds are kept; what was interrupted there goes on.

    Returns:
        Weights, their verdicts and accuracies.

    Raises:
        InputError: if the data cannot be read or are too few.
        DivergenceError: if a descent diverges.
    """
    data, apart = load_apart(settings.data)
    runs = []
    for k in range(settings.seeds):

        def done(share: float, k: int = k) -> None:
            report("cleaning", (k + share) / settings.seeds)

        seed = settings.seed + k
        part = None if kept is None else kept.part(f"seed-{seed}-descent")

        def run(seed: int = seed, part: Kept | None = part, done: Any = done) -> CleaningRun:
            return _Experiment(data, apart, settings, seed, part).run(done)

        runs.append(finished(kept, f"seed-{seed}", run))
    return CleaningResult(settings, data.name, tuple(runs))


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A model of one way of training, and what chose it."""

    params: Params
    decay: float
    steps: int
    loss: float  # on held-out data, before they were trained on


class _Looks:
    """What was seen of held-out data on the way, and the time of the descent alone."""

    def __init__(self) -> None:
        self.all: list[tuple[float, int, Tensor]] = []  # loss, update, weights
        self.clock = Clock()

    def state_dict(self) -> dict[str, Any]:
        return {"all": self.all, "clock": self.clock.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.all = [*state["all"]]
        self.clock.load_state_dict(state["clock"])


class _Experiment:
    """One seed: its data, the descent, and every way to train."""

    def __init__(
        self,
        data: Dataset,
        apart: Dataset | None,
        settings: CleaningSettings,
        seed: int,
        kept: Kept | None,
    ) -> None:
        self.settings, self.seed, self.kept = settings, seed, kept
        generator = torch.Generator().manual_seed(seed)
        if apart is None:
            self.clean, self.validation, self.test = split(data, settings.parts, generator)
        else:
            self.clean, self.validation = split(data, settings.parts[:2], generator)
            (self.test,) = split(apart, settings.parts[2:], generator)
        self.noisy: Corrupted = corrupt(self.clean, settings.share, settings.convention, generator)
        n = len(self.validation)
        if n <= settings.folds:
            raise InputError(
                f"{settings.folds + 1} validation samples were needed, one a fold and one held "
                f"out, got {n}; take more."
            )
        self.n_outer = n - max(1, min(n // 5, n - settings.folds))
        self.outer = self.validation[: self.n_outer]
        self.held = self.validation[self.n_outer :]
        self.start = start(
            settings.model, data.inputs.shape[1], data.n_classes, settings.hidden, generator
        )

    def method(self) -> bl.methods.HypergradientMethod:
        """How hypergradients are found."""
        settings = self.settings
        if settings.method != Method.IMPLICIT:
            return settings.method.chosen
        return bl.Implicit(
            bl.linear.CG(rtol=1e-2, max_steps=settings.krylov_steps, damping=settings.damping)
        )

    def solver(self) -> bl.BilevelSolver:
        """The bilevel problem of the weights, and how it is solved: params are one model a fold."""
        settings, noisy = self.settings, self.noisy.data
        folds = torch.arange(self.n_outer).tensor_split(settings.folds)
        judged = [_pair(self.outer[fold]) for fold in folds]
        rests = [torch.cat([*folds[:k], *folds[k + 1 :]]) for k in range(len(folds))]
        trained = [_gathered([_whole(noisy), _whole(self.outer[rest])]) for rest in rests]

        def inner(params: Sequence[Params], alpha: Tensor, _batch: object) -> Tensor:
            terms = []
            for model, (inputs, labels, weights) in zip(params, trained, strict=True):
                ones = weights[len(alpha) :]
                shares = torch.cat([alpha.sigmoid(), ones]) / (len(alpha) / 2 + len(ones))
                terms.append(objective(model, inputs, labels, shares, settings.learning_decay))
            return torch.stack(terms).sum()

        def outer(params: Sequence[Params], _alpha: Tensor, _batch: object) -> Tensor:
            each = [losses(model, *pair) for model, pair in zip(params, judged, strict=True)]
            return torch.cat(each).mean()

        # The Hessian of the cross-entropy in the logits is at most 1/2, and no share is above twice
        # that of a mean over all samples. A bound for linear models; a network's first layer alike.
        inputs = trained[0][0]
        curvature = float(torch.linalg.matrix_norm(inputs, 2)) ** 2 / len(inputs) + 1
        return bl.BilevelSolver(
            bl.BilevelProblem(inner, outer),
            bl.optim.SGD(1 / (curvature + settings.learning_decay), momentum=0.9),
            settings.inner_steps,
            self.method(),
            certificate=None,
            on_failure="ignore",
        )

    def tuned(self, parts: Sequence[tuple[Dataset, Tensor]]) -> _Fitted:
        """The fit to weighted data, with the decay and the steps that are best on held-out data."""
        samples = _gathered(parts)
        best = None
        for decay in sorted(self.settings.decays, reverse=True):
            stopped = self.stopped(fits(self.start, *samples, decay, _LOOK), decay)
            if best is not None and stopped.loss >= best.loss:
                break
            best = stopped
        assert best is not None  # there is a decay
        return best

    def stopped(self, models: Iterator[Params], decay: float) -> _Fitted:
        """The best model on the way, until some in a row are no better."""
        best = None
        for k in range(1, max(self.settings.fit_steps // _LOOK, 1) + 1):
            model = next(models)
            loss = float(losses(model, *_pair(self.held)).mean())
            if best is None or loss < best.loss:
                best = _Fitted(model, decay, k * _LOOK, loss)
            elif k * _LOOK - best.steps >= _PATIENCE:
                break
        assert best is not None  # there was a look
        return best

    def trained(self, train: Dataset | None, weights: Tensor, *, validated: bool) -> _Fitted:
        """A way of training; what held-out data chose is kept when they are trained on too."""
        begin = [] if train is None else [(train, weights)]
        chosen = self.tuned(begin + ([_whole(self.outer)] if validated else []))
        if not validated:
            return chosen
        samples = _gathered([*begin, _whole(self.validation)])
        params = fit(self.start, *samples, chosen.decay, chosen.steps)
        return replace(chosen, params=params)

    def learn(
        self, done: Callable[[float], None]
    ) -> tuple[Tensor, bl.solution.Solution, int, float]:
        """Weights by bilevel descent, those of the look that was best on held-out data."""
        settings, solver = self.settings, self.solver()
        noisy, n = self.noisy.data, len(self.noisy.data)
        looks = _Looks()

        def look(progress: bl.outer.Progress) -> None:
            done(progress.step / settings.updates)
            if progress.step % settings.every and progress.step != settings.updates:
                return
            weights = progress.control.sigmoid().clone()
            with looks.clock.paused():
                found = self.tuned([(noisy, weights), _whole(self.outer)])
            looks.all.append((found.loss, progress.step, weights))

        samples = _gathered([(noisy, torch.full((n,), 0.5)), _whole(self.outer)])
        begin = fit(self.start, *samples, settings.learning_decay, settings.fit_steps)
        looks.clock.start()
        solution = solver.solve(
            [begin] * settings.folds,
            torch.zeros(n),
            lambda alpha: torch.optim.SGD(alpha, settings.rate * n, momentum=0.9),
            steps=settings.updates,
            callback=look,
            **solving(self.kept, "weights", also=looks),
        )
        seconds = looks.clock.seconds
        _, step, weights = min(looks.all, key=lambda one: one[0])
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
            {way: one.steps for way, one in fitted.items()},
            {way: one.loss for way, one in fitted.items()},
            seconds,
        )


def _pair(data: Dataset) -> tuple[Tensor, Tensor]:
    return data.inputs, data.labels


def _gathered(parts: Sequence[tuple[Dataset, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and weights of all, one after the other."""
    return (
        torch.cat([data.inputs for data, _ in parts]),
        torch.cat([data.labels for data, _ in parts]),
        torch.cat([weights for _, weights in parts]),
    )


def _whole(data: Dataset) -> tuple[Dataset, Tensor]:
    """Data with weights one."""
    return data, torch.ones(len(data))
