"""L1 logistic regression on measured data: a hypergradient whose certificate is trusted."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer

import bilevel as bl

F64 = torch.float64
DATA = load_breast_cancer()
ORDER = np.random.default_rng(0).permutation(len(DATA.target))
X = torch.from_numpy((DATA.data - DATA.data.mean(0)) / DATA.data.std(0))
X = torch.cat([X, torch.ones(len(X), 1, dtype=F64)], 1)[ORDER]
Y = torch.from_numpy(DATA.target.astype(float))[ORDER]
TRAIN, VALIDATION = (X[:350], Y[:350]), (X[350:], Y[350:])
FREE = torch.tensor([1.0] * 30 + [0.0], dtype=F64)  # the intercept has no weight
STEP = 4 * 350 / float(torch.linalg.matrix_norm(TRAIN[0], 2)) ** 2


def loss(w, batch):
    z = batch[0] @ w
    return (torch.nn.functional.softplus(z) - batch[1] * z).mean()


def solve(w, log_weight, _batch):
    """Accelerated proximal gradient, then Newton's method on the support that it finds."""
    (x, y), weight = TRAIN, log_weight.exp() * FREE
    v, momentum = w, 1.0
    for _ in range(1500):
        slope = x.T @ (torch.sigmoid(x @ v) - y) / len(y)
        new = v - STEP * slope
        new = torch.sign(new) * (new.abs() - STEP * weight).clamp_min(0)
        if (v - new) @ (new - w) > 0:
            momentum = 1.0
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        w, v, momentum = new, new + (momentum - 1) / after * (new - w), after
    support, signs = w != 0, torch.sign(w)
    for _ in range(10):
        p = torch.sigmoid(x @ w)
        slope = (x.T @ (p - y) / len(y) + weight * signs)[support]
        part = x[:, support]
        w = w.clone()
        w[support] -= torch.linalg.solve(part.T @ ((p * (1 - p))[:, None] * part) / len(y), slope)
    return w


@pytest.mark.parametrize("log_weight", [-4.0, -3.0])
def test_the_certificate_of_an_l1_logistic_regression_is_trusted(log_weight):
    problem = bl.BilevelProblem(
        lambda w, a, batch: loss(w, TRAIN), lambda w, a, batch: loss(w, VALIDATION)
    )
    rule = bl.optim.ProximalGradient(STEP, bl.prox.L1(lambda a: a.exp() * FREE))
    solver = bl.BilevelSolver(
        problem,
        bl.Given(solve, rule),
        method=bl.Implicit(bl.linear.GMRES(restart=60)),
        on_failure="raise",
    )
    start, a = torch.zeros(31, dtype=F64), torch.tensor(log_weight, dtype=F64)
    found = solver.hypergradient(start, a)
    assert found.certificate.trustworthy
    assert 0 < int((found.params != 0).sum()) < 31
    high, low = (solver.value(start, a + h) for h in (1e-4, -1e-4))
    assert found.gradient.item() == pytest.approx(float(high - low) / 2e-4, rel=1e-5)
