"""Certificates on random problems: how many were trusted in error, how many refused without need.

`python -m benchmarks.trust 2000` makes that many problems: ridge and logistic regression (scaled
and not, float32 too), softmax with a free bias, tanh nets from zeros, equal and random weights,
double wells, lasso and boxes, minibatches, matrices of task weights. The truth is the
hypergradient at the minimiser that a dense Newton iteration in float64 finds from the inner
solution; where the Hessian there has a negative eigenvalue there is none, and any trust is in
error. Of a matrix of weights every column has to be right.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel as bl

F64 = torch.float64
TRUST = 2e-2


@dataclass(frozen=True)
class Sample:
    """One problem, where it starts, and how it is solved."""

    family: str
    problem: bl.BilevelProblem
    params: Tensor
    control: Tensor
    solver: bl.BilevelSolver
    smooth: Callable[[Tensor, Tensor], Tensor]  # inner objective of the truth, (params, control)
    convex: bool
    prox: Any = None
    batches: tuple[Any, Any] = (None, None)


class Draw:
    """Random numbers of one problem."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def pick(self, *choices: Any) -> Any:
        return choices[self.whole(0, len(choices))]


def method(draw: Draw, *, symmetric: bool = True) -> Any:
    implicit = [bl.linear.GMRES(), bl.linear.NormalCG()]
    if symmetric:
        implicit += [bl.linear.CG(rtol=1e-8), bl.linear.CG(rtol=1e-3), bl.linear.Dense()]
    return draw.pick(
        bl.MLM(), bl.Unrolled(), bl.MLM(last=3), bl.OneStep(), bl.Implicit(draw.pick(*implicit))
    )


def solver_of(problem: Any, rule: Any, steps: int, how: Any) -> bl.BilevelSolver:
    return bl.BilevelSolver(problem, rule, steps, how, on_failure="ignore")


def regression(draw: Draw, *, logistic: bool, single: bool) -> Sample:
    d, n = draw.whole(1, 15), 40
    X, V = draw.normal(n, d), draw.normal(n, d)
    if draw.whole(0, 3) == 0:  # unknowns of unlike scale
        scales = 10 ** (2 * torch.rand(d, generator=draw.generator, dtype=F64))
        X, V = X * scales, V * scales
    truth = draw.normal(d)
    y, z = X @ truth + draw.normal(n), V @ truth + draw.normal(n)
    vector = bool(draw.whole(0, 2))

    def loss(A: Tensor, w: Tensor, target: Tensor) -> Tensor:
        if logistic:
            return torch.nn.functional.softplus(-torch.sign(target) * (A @ w)).mean()
        return ((A @ w - target) ** 2).mean() / 2

    def smooth(w: Tensor, a: Tensor) -> Tensor:
        return loss(X.to(w), w, y.to(w)) + (a.exp() * w**2).sum() / 2

    problem = bl.BilevelProblem(
        lambda w, a, b: smooth(w, a), lambda w, a, b: loss(V.to(w), w, z.to(w))
    )
    control = draw.uniform(-4, 0) + 0.3 * draw.normal(d) if vector else draw.normal() - 2
    largest = float(torch.linalg.eigvalsh(X.T @ X / n)[-1]) * (0.25 if logistic else 1) + 1
    rule = bl.optim.SGD(1 / largest, momentum=draw.pick(0.0, 0.5))
    steps = draw.pick(1, 5, 30, 100, 400)
    kind = torch.float32 if single else F64
    family = ("logistic" if logistic else "ridge") + (", float32" if single else "")
    how = method(draw)
    return Sample(
        family,
        problem,
        torch.zeros(d, dtype=kind),
        control.to(kind),
        solver_of(problem, rule, steps, how),
        smooth,
        convex=True,
    )


def softmax(draw: Draw) -> Sample:
    n, d, k = 40, draw.whole(2, 5), 3
    X, V = draw.normal(n, d), draw.normal(n, d)
    y, z = draw.normal(n, k).argmax(1), draw.normal(n, k).argmax(1)
    ce = torch.nn.functional.cross_entropy

    def logits(w: Tensor, A: Tensor) -> Tensor:
        return A @ w[: d * k].reshape(d, k) + w[d * k :]

    def smooth(w: Tensor, a: Tensor) -> Tensor:
        return ce(logits(w, X), y) + a.exp() * (w[: d * k] ** 2).sum()

    problem = bl.BilevelProblem(lambda w, a, b: smooth(w, a), lambda w, a, b: ce(logits(w, V), z))
    how, steps = method(draw), draw.pick(10, 30, 100, 400)
    start = torch.zeros(d * k + k, dtype=F64)
    return Sample(
        "softmax, free bias",
        problem,
        start,
        draw.normal() - 2,
        solver_of(problem, bl.optim.SGD(0.7), steps, how),
        smooth,
        convex=False,
    )


def net(draw: Draw) -> Sample:
    n, d, m = 25, 3, 4
    X, V = draw.normal(n, d), draw.normal(n, d)
    y, z = torch.sin(2 * X[:, 0]), torch.sin(2 * V[:, 0])

    def fit(w: Tensor, A: Tensor) -> Tensor:
        hidden = torch.tanh(A @ w[: d * m].reshape(d, m) + w[d * m : d * m + m])
        return hidden @ w[d * m + m : d * m + 2 * m]

    def smooth(w: Tensor, a: Tensor) -> Tensor:
        return ((fit(w, X) - y) ** 2).mean() + a.exp() * (w**2).sum()

    problem = bl.BilevelProblem(
        lambda w, a, b: smooth(w, a), lambda w, a, b: ((fit(w, V) - z) ** 2).mean()
    )
    size = d * m + 2 * m
    start = draw.pick(
        torch.zeros(size, dtype=F64), 0.3 * torch.ones(size, dtype=F64), draw.normal(size)
    )
    how, steps = method(draw), draw.pick(100, 400, 1200)
    return Sample(
        "tanh net",
        problem,
        start,
        draw.uniform(-5, -2) * torch.ones((), dtype=F64),
        solver_of(problem, bl.optim.SGD(0.2, momentum=0.8), steps, how),
        smooth,
        convex=False,
    )


def well(draw: Draw) -> Sample:
    d = draw.whole(2, 6)
    scale = 0.5 + torch.rand(d, generator=draw.generator, dtype=F64)

    def smooth(w: Tensor, a: Tensor) -> Tensor:
        return (scale[1:] * w[1:] ** 2).sum() - w[0] ** 2 + w[0] ** 4 + a * w[1] * w[0]

    problem = bl.BilevelProblem(lambda w, a, b: smooth(w, a), lambda w, a, b: ((w - 1) ** 2).sum())
    start = draw.normal(d)
    start[0] = draw.pick(0.0, 0.3)
    control = torch.tensor(draw.pick(0.0, 0.2), dtype=F64)
    prox = draw.whole(0, 2) == 0
    how = method(draw, symmetric=not prox)
    rule: Any = bl.optim.SGD(0.1)
    if prox:
        rule = bl.optim.ProximalGradient(0.1, bl.prox.L2(0.0))
    return Sample(
        "double well",
        problem,
        start,
        control,
        solver_of(problem, rule, draw.pick(50, 300), how),
        smooth,
        convex=False,
    )


def kinked(draw: Draw) -> Sample:
    d, n = draw.whole(2, 9), 40
    X, V = draw.normal(n, d), draw.normal(n, d)
    sparse = draw.normal(d) * (draw.normal(d) > 0)
    y, z = X @ sparse + 0.3 * draw.normal(n), V @ sparse + 0.3 * draw.normal(n)

    def smooth(w: Tensor, a: Tensor) -> Tensor:
        return ((X @ w - y) ** 2).mean() / 2 + (a.exp() * w**2).sum() / 2

    problem = bl.BilevelProblem(
        lambda w, a, b: smooth(w, a), lambda w, a, b: ((V @ w - z) ** 2).mean() / 2
    )
    prox = draw.pick(bl.prox.L1(0.1), bl.prox.Box(0.0, None), bl.prox.Box(-0.3, 0.5))
    step = 1 / (float(torch.linalg.eigvalsh(X.T @ X / n)[-1]) + 1)
    how, steps = method(draw, symmetric=False), draw.pick(10, 50, 200, 800)
    return Sample(
        "lasso and box",
        problem,
        torch.zeros(d, dtype=F64),
        draw.normal(d) - 2,
        solver_of(problem, bl.optim.ProximalGradient(step, prox), steps, how),
        smooth,
        convex=False,
        prox=(prox, step),
    )


def batched(draw: Draw) -> Sample:
    d, n = draw.whole(2, 7), 64
    X, V = draw.normal(n, d), draw.normal(n, d)
    truth = draw.normal(d)
    y, z = X @ truth + 0.3 * draw.normal(n), V @ truth + 0.3 * draw.normal(n)
    everything = torch.arange(n)

    def smooth(w: Tensor, a: Tensor, batch: Tensor = everything) -> Tensor:
        return (a[batch].exp() * (X[batch] @ w - y[batch]) ** 2).mean() + 0.1 * (w**2).sum()

    problem = bl.BilevelProblem(
        lambda w, a, b: smooth(w, a, b), lambda w, a, b: ((V @ w - z) ** 2).mean()
    )
    size = draw.pick(8, 32, 64)
    batches = bl.ByStep(lambda t: (everything[:size] + size * (t - 1)) % n)
    linear = draw.pick(None, everything)
    how, steps = method(draw), draw.pick(20, 100, 400)
    return Sample(
        "minibatches",
        problem,
        torch.zeros(d, dtype=F64),
        0.3 * draw.normal(n),
        solver_of(problem, bl.optim.SGD(0.05), steps, how),
        smooth,
        convex=False,
        batches=(batches, linear),
    )


def columns(draw: Draw) -> Sample:
    d, tasks, m = draw.whole(2, 6), draw.whole(2, 6), draw.whole(2, 4)
    X, Y = draw.normal(tasks, 20, d), draw.normal(tasks, 20)
    V, Z = draw.normal(m, 20, d), draw.normal(m, 20)
    scales = torch.tensor([10 ** draw.uniform(-3, 0) for _ in range(m)], dtype=F64)
    weights = bl.TaskWeights(n_tasks=tasks, n_validations=m)
    decay = draw.pick(0.03, 0.3)
    problem = bl.weighted_problem(
        lambda w, b: ((X @ w - Y) ** 2).mean(1) / 2 + decay * (w**2).sum() / 2,
        lambda w, b: scales * ((V @ w - Z) ** 2).mean(1),
        weights,
        bl.Looped(),
    )
    how, steps = method(draw), draw.pick(5, 20, 80, 400)
    return Sample(
        "weight columns",
        problem,
        weights.stacked(torch.zeros(d, dtype=F64)),
        weights.initial(F64) + draw.normal(tasks, m),
        solver_of(problem, bl.optim.SGD(draw.pick(0.1, 0.3)), steps, how),
        lambda w, a: problem.inner(w, a, None),
        convex=True,
    )


FAMILIES: list[Callable[[Draw], Sample]] = [
    lambda draw: regression(draw, logistic=False, single=False),
    lambda draw: regression(draw, logistic=True, single=False),
    lambda draw: regression(draw, logistic=draw.whole(0, 2) == 0, single=True),
    softmax,
    net,
    well,
    kinked,
    batched,
    columns,
]


def truth(sample: Sample, found: Tensor) -> Tensor | None:
    """The hypergradient at the minimiser near `found`; None where there is none."""
    w, a = found.to(F64), sample.control.to(F64)
    if sample.prox is not None:
        return on_active_set(sample, w, a)
    shape, w = w.shape, w.flatten()

    def smooth(w: Tensor, a: Tensor) -> Tensor:
        return sample.smooth(w.reshape(shape), a)

    gradient, hessian = torch.func.grad(smooth), torch.func.hessian(smooth)
    for _ in range(100):
        g, H = gradient(w, a), hessian(w, a)
        step = torch.linalg.pinv(H, rtol=1e-10, hermitian=True) @ g
        w = w - step / max(1.0, float(step.norm()))
        if float(g.norm()) < 1e-13 * (1 + float(H.norm()) * float(w.norm())):
            break
    H = hessian(w, a)
    eigenvalues = torch.linalg.eigvalsh(H)
    if float(eigenvalues[0]) < -1e-8 * float(eigenvalues[-1].abs()) or not bool(w.isfinite().all()):
        return None
    inverse = torch.linalg.pinv(H, rtol=1e-10, hermitian=True)
    return through(sample, w.reshape(shape), a, inverse)


def through(sample: Sample, w: Tensor, a: Tensor, inverse: Tensor) -> Tensor:
    b, d = torch.func.grad(lambda w, a: sample.problem.outer(w, a, None), argnums=(0, 1))(w, a)
    mixed = torch.func.jacrev(torch.func.grad(sample.smooth), argnums=1)(w, a)
    q = (inverse @ b.flatten()).reshape(b.shape)
    return d - torch.tensordot(q, mixed, dims=q.ndim)


def error_of(found: Tensor, exact: Tensor) -> float:
    """Relative, of the worst column."""
    gap, size = (found - exact).norm(dim=0), exact.norm(dim=0)
    return float(torch.where(size > 0, gap / size, gap).max())


def on_active_set(sample: Sample, w: Tensor, a: Tensor) -> Tensor | None:
    prox, step = sample.prox
    gradient = torch.func.grad(sample.smooth)
    for _ in range(20000):
        new = prox(w - step * gradient(w, a), step, a)
        if torch.equal(new, w):
            break
        w = new
    z = w - step * gradient(w, a)
    active = torch.func.jacrev(lambda z: prox(z, step, a))(z).diagonal() > 0.5
    H = torch.func.hessian(sample.smooth)(w, a)
    inverse = torch.zeros_like(H)
    rows = active.nonzero()[:, 0]
    inverse[rows[:, None], rows] = torch.linalg.inv(H[rows[:, None], rows])
    return through(sample, w, a, inverse)


def main(n: int) -> None:
    """Count, by family."""
    torch.set_num_threads(1)
    counts: dict[str, Counter] = {}
    for seed in range(n):
        sample = FAMILIES[seed % len(FAMILIES)](Draw(seed))
        inner, linear = sample.batches
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sample.solver.hypergradient(
                sample.params, sample.control, inner, linear_batch=linear
            )
        exact, count = truth(sample, found.params), counts.setdefault(sample.family, Counter())
        trusted = found.certificate is not None and found.certificate.trustworthy
        error = float("inf")
        if exact is not None:
            error = error_of(found.gradient.to(F64), exact)
        count["problems"] += 1
        count["trusted"] += trusted
        # Twice the trust: an estimate is no bound, and an error just above it is no lie.
        if trusted and error > 1.5 * TRUST:
            count["WRONG"] += 1
            print(
                "wrong:",
                seed,
                sample.family,
                type(sample.solver.method).__name__,
                f"{error:.1e}",
                found.certificate,
            )
        if error < TRUST / 10:
            count["right"] += 1
            if not trusted:
                count["refused"] += 1
                if sample.convex:
                    count["refused, convex"] += 1
                if "-v" in sys.argv:
                    print("refused:", seed, sample.family, f"{error:.1e}", found.certificate.reason)
    for family, count in counts.items():
        print(f"{family:20} " + "  ".join(f"{name} {value}" for name, value in count.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
