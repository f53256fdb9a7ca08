"""Time to a validation loss: an elastic net with a weight and a decay for each feature.

Run with `python -m benchmarks.elastic_net [--seed 0]`; sparho and celer are compared with where
they are installed. 72 samples of 7129 correlated features, 48 to train and 24 to validate on, as
the leukemia data have; of the features 8 count. All see this one split. Processor time, one thread.

`LassoCV` and `ElasticNetCV` search a grid of one weight (and a ratio); sparho descends on one
weight, or on one for each feature. Ours are 2 x 7129 numbers, from one weight and one decay for
all; the solution comes from an active set method in NumPy, by `Given`. Each runs once before, so
that what it loads at first (1.5 s of torch) is not counted.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from sklearn.linear_model import ElasticNetCV, LassoCV

import bilevel as bl
from benchmarks.measure import machine

N_TRAIN, N_VALIDATION, N_FEATURES, N_TRUE = 48, 24, 7129, 8
Array = np.ndarray


@dataclass(frozen=True)
class Data:
    """One split; `test` are 2000 further samples."""

    x: Array
    y: Array
    test: tuple[Array, Array]

    @property
    def train(self) -> tuple[Array, Array]:
        return self.x[:N_TRAIN], self.y[:N_TRAIN]

    @property
    def validation(self) -> tuple[Array, Array]:
        return self.x[N_TRAIN:], self.y[N_TRAIN:]

    @property
    def largest(self) -> float:
        """The least weight of a lasso for which nothing is left."""
        x, y = self.train
        return float(np.abs(x.T @ y).max() / N_TRAIN)


def drawn(seed: int) -> Data:
    generator = np.random.default_rng(seed)
    truth = np.zeros(N_FEATURES)
    places = generator.choice(N_FEATURES, N_TRUE, replace=False)
    truth[places] = generator.choice([-1.0, 1.0], N_TRUE) * generator.uniform(0.5, 2.0, N_TRUE)

    def samples(n: int) -> tuple[Array, Array]:
        x = generator.standard_normal((n, N_FEATURES))
        for j in range(1, N_FEATURES):  # neighbours are correlated
            x[:, j] = 0.5 * x[:, j - 1] + np.sqrt(0.75) * x[:, j]
        return x, x @ truth + generator.standard_normal(n)

    x, y = samples(N_TRAIN + N_VALIDATION)
    return Data(np.asfortranarray(x), y, samples(2000))


def mse(coef: Array, batch: tuple[Array, Array]) -> float:
    x, y = batch
    return float(np.mean((x @ coef - y) ** 2))


def active_set(x: Array, y: Array, weight: Array, decay: Array, coef: Array) -> Array:
    """The elastic net with a weight and a decay for each feature, exactly on its support."""
    n, coef = len(y), coef.copy()
    for _ in range(100):
        slope = x.T @ (x @ coef - y) / n + decay * coef
        beyond = np.abs(slope) - weight
        off = (coef == 0) & (beyond > 1e-9 * weight)
        chosen = np.flatnonzero(coef)
        new = np.flatnonzero(off)
        new = new[np.argsort(beyond[new])[::-1][:20]]
        w, before = np.union1d(chosen, new), coef.copy()
        gram = x[:, w].T @ x[:, w] / n + np.diag(decay[w])
        coef[w] = _by_coordinates(gram, x[:, w].T @ y / n, weight[w], coef[w])
        if not len(new) and np.abs(coef - before).max() <= 1e-10 * np.abs(coef).max(initial=0):
            break
    return coef


def _by_coordinates(gram: Array, b: Array, weight: Array, coef: Array) -> Array:
    for sweep in range(200):
        largest = 0.0
        for j in range(len(coef)):
            z = b[j] - gram[j] @ coef + gram[j, j] * coef[j]
            new = np.sign(z) * max(abs(z) - weight[j], 0.0) / gram[j, j]
            largest, coef[j] = max(largest, abs(new - coef[j])), new
        support = np.flatnonzero(coef)
        if largest <= 1e-12 * np.abs(coef).max(initial=0):
            break
        if sweep % 10 == 9 and len(support):  # where the signs are right, all at once
            signs = np.sign(coef[support])
            inner = gram[np.ix_(support, support)]
            exact = np.linalg.solve(inner, b[support] - weight[support] * signs)
            if (np.sign(exact) == signs).all():
                coef[support] = exact
    return coef


Trace = Iterator[tuple[float, Array]]  # seconds so far, coefficients on the training data


def ours(data: Data, updates: int) -> Trace:
    x, y = data.train
    X, Y, V, Z = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, y, *data.validation))
    begun = time.process_time()
    step = float(1 / (torch.linalg.matrix_norm(X, 2) ** 2 / N_TRAIN + 1))

    def solve(w: torch.Tensor, c: dict[str, torch.Tensor], _batch: object) -> torch.Tensor:
        given = (c["weight"].exp().numpy(), c["decay"].exp().numpy(), w.numpy())
        return torch.from_numpy(active_set(x, y, *given))

    problem = bl.BilevelProblem(
        lambda w, c, _batch: (
            (X @ w - Y).square().sum() / (2 * N_TRAIN) + (c["decay"].exp() * w.square()).sum() / 2
        ),
        lambda w, _c, _batch: (V @ w - Z).square().mean(),
    )
    rule = bl.optim.ProximalGradient(step, bl.prox.L1(lambda c: c["weight"].exp()))
    solver = bl.BilevelSolver(
        problem,
        bl.Given(solve, rule),
        method=bl.Implicit(bl.linear.GMRES(restart=100, rtol=1e-4)),
        certificate=None,
    )
    full = torch.full((N_FEATURES,), 1.0, dtype=torch.float64)
    control = {"weight": full * np.log(data.largest / 5), "decay": full * np.log(1e-2)}
    seen: list[tuple[float, Array]] = []
    solver.solve(
        torch.zeros(N_FEATURES, dtype=torch.float64),
        control,
        lambda leaves: torch.optim.SGD(leaves, 0.1),
        steps=updates,
        callback=lambda p: seen.append((time.process_time() - begun, p.found.params.numpy())),
    )
    yield from seen


def by_sparho(data: Data, penalty: str) -> Trace:
    from sparho import hoag_search
    from sparho.adapters import CelerLasso, SklearnWeightedLasso
    from sparho.criteria import HeldOutMSE
    from sparho.problem import L1, Problem, SquaredLoss, WeightedL1

    single = penalty == "one weight"
    problem = Problem(SquaredLoss(), L1() if single else WeightedL1(), data.x, data.y)
    rows = np.arange(len(data.y))
    criterion = HeldOutMSE(rows[:N_TRAIN], rows[N_TRAIN:])
    start = data.largest / 5
    begun, seen = time.process_time(), []

    class Noting(HeldOutMSE):
        """The same, with its coefficients noted as they come."""

        __slots__ = ()

        def value_and_hypergrad(self, *args: object, **kwargs: object) -> object:
            found = HeldOutMSE.value_and_hypergrad(self, *args, **kwargs)
            seen.append((time.process_time() - begun, np.array(found.coef)))
            return found

    hoag_search(
        problem,
        start if single else np.full(N_FEATURES, start),
        solver=CelerLasso() if single else SklearnWeightedLasso(),
        criterion=Noting(criterion.idx_train, criterion.idx_val),
        n_iter=25,
    )
    yield from seen


def by_grid(make: Callable[..., object], data: Data, **settings: object) -> tuple[float, float]:
    """Seconds, and the least validation loss on the grid."""
    rows = np.arange(len(data.y))
    split = [(rows[:N_TRAIN], rows[N_TRAIN:])]
    make(cv=split, fit_intercept=False, n_alphas=3).fit(data.x, data.y)
    begun = time.process_time()
    found = make(cv=split, fit_intercept=False, **settings).fit(data.x, data.y)
    return time.process_time() - begun, float(np.min(found.mse_path_))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    data = drawn(given.seed)
    grids = {
        "LassoCV, 100 weights": by_grid(LassoCV, data),
        "ElasticNetCV, 3 x 100": by_grid(ElasticNetCV, data, l1_ratio=[0.5, 0.9, 0.99]),
    }
    for name, (seconds, loss) in grids.items():
        print(f"{name:32} validation {loss:8.4f}  {seconds:7.2f} s")
    list(ours(data, 2))
    traces = {"bilevel, 2 x 7129 numbers": list(ours(data, given.updates))}
    if find_spec("sparho") and find_spec("celer"):
        for penalty in ("one weight", "a weight for each feature"):
            list(by_sparho(data, penalty))
            traces[f"sparho, {penalty}"] = list(by_sparho(data, penalty))
    for name, trace in traces.items():
        losses = [mse(coef, data.validation) for _, coef in trace]
        best = int(np.argmin(losses))
        print(
            f"{name:32} validation {losses[best]:8.4f}  {trace[best][0]:7.2f} s, "
            f"test {mse(trace[best][1], data.test):.3f}, {len(trace)} evaluations"
        )
        for target, (seconds, loss) in grids.items():
            times = [t for (t, _), value in zip(trace, losses, strict=True) if value <= loss]
            reached = f"{times[0]:.2f} s, {seconds / times[0]:.1f} x" if times else "not reached"
            print(f"    to the loss of {target}: {reached}")


if __name__ == "__main__":
    main()
