r"""
An elastic net of scikit-learn, tuned by its hypergradient
==========================================================

A lasso and a decay for *each* feature are twice as many hyper-parameters as features: no grid
search gets there. Coordinate descent of scikit-learn finds the solution, which torch cannot see
into; the library differentiates it by the equation that it solves, and says how far to trust that.
"""

# %%
# The problem
# -----------
# Few samples, many features, and a solution of which a handful count:
#
# .. math::
#     \min_w \tfrac{1}{2n} |X w - y|^2 + \sum_i e^{a_i} |w_i| + \tfrac12 \sum_i e^{b_i} w_i^2 .
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import ElasticNetCV, Lasso
from torch import Tensor

import bilevel as bl

N_SAMPLES, N_FEATURES, N_TRUE = 60, 100, 8
UPDATES = 20
generator = torch.Generator().manual_seed(0)
truth = torch.zeros(N_FEATURES, dtype=torch.float64)
truth[:N_TRUE] = torch.tensor(
    [2.0, -2.0, 1.5, -1.5, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64
)


def data(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, N_FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, x @ truth + noise


train, validation, test = data(N_SAMPLES), data(60), data(1000)


def error(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (x @ w - y).square().mean()


# %%
# The solver
# ----------
# scikit-learn knows one weight for all features. Scaled columns, and rows below them for the decay,
# turn its lasso into ours: with :math:`w_i = v_i / s_i` and :math:`s_i = e^{a_i}` the penalty is
# :math:`|v|_1`.
def by_scikit_learn(
    w: Tensor, control: dict[str, Tensor], _batch: object
) -> Tensor:
    scales, decay = control["lasso"].exp(), control["decay"].exp()
    x, y = train
    below = (N_SAMPLES * decay).sqrt().diag()
    stacked = (torch.cat([x, below]) / scales).numpy()
    target = torch.cat(
        [y, torch.zeros(N_FEATURES, dtype=torch.float64)]
    ).numpy()
    rows = len(target)
    fit = Lasso(
        alpha=N_SAMPLES / rows, fit_intercept=False, tol=1e-10, max_iter=100_000
    )
    fit.set_params(warm_start=True)
    fit.coef_ = (w * scales).numpy()
    return torch.from_numpy(fit.fit(stacked, target).coef_) / scales


# %%
# Its place in the bilevel problem
# --------------------------------
# ``Given`` takes the place of an inner optimiser. The rule tells of which equation the solution is
# one: the fixed point of proximal gradient steps, none of which is made.
def fit_error(w: Tensor, control: dict[str, Tensor], _batch: object) -> Tensor:
    return error(w, train) / 2 + (control["decay"].exp() * w.square()).sum() / 2


step_size = float(
    1 / (torch.linalg.matrix_norm(train[0], 2) ** 2 / N_SAMPLES + 1)
)
rule = bl.optim.ProximalGradient(
    step_size, bl.prox.L1(lambda control: control["lasso"].exp())
)
problem = bl.BilevelProblem(
    inner=fit_error, outer=lambda w, _control, _batch: error(w, validation)
)
solver = bl.BilevelSolver(
    problem,
    bl.Given(by_scikit_learn, rule),
    method=bl.Implicit(bl.linear.GMRES(restart=100)),
    on_failure="ignore",
)

# %%
# Descent along the hypergradient
# -------------------------------
# From one weight for all, as cross-validation finds it. Validation data choose 200 numbers here, so
# that a little less than their minimum is better on other data: descent is stopped early.
began = time.perf_counter()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    grid = ElasticNetCV(
        l1_ratio=[0.5, 0.9, 0.99], cv=5, fit_intercept=False
    ).fit(*map(np.asarray, train))
grid_seconds = time.perf_counter() - began
weight = grid.alpha_ * grid.l1_ratio_
start = {
    "lasso": torch.full(
        (N_FEATURES,), float(np.log(weight)), dtype=torch.float64
    ),
    "decay": torch.full(
        (N_FEATURES,),
        float(np.log(grid.alpha_ * (1 - grid.l1_ratio_))),
        dtype=torch.float64,
    ),
}
tests: list[float] = []
began = time.perf_counter()
solution = solver.solve(
    torch.from_numpy(grid.coef_),
    start,
    lambda leaves: torch.optim.Adam(leaves, 0.1),
    steps=UPDATES,
    callback=lambda seen: tests.append(float(error(seen.found.params, test))),
)
seconds = time.perf_counter() - began
by_grid = [
    float(error(torch.from_numpy(grid.coef_), batch))
    for batch in (validation, test)
]
trusted = sum(certificate.trustworthy for certificate in solution.certificates)
print(
    f"cross-validation: validation {by_grid[0]:.3f}, "
    f"test {by_grid[1]:.3f}, {grid_seconds:.1f} s"
)
print(
    f"hypergradients:   validation {solution.value:.3f}, "
    f"test {tests[-1]:.3f}, {seconds:.1f} s"
)
print(f"{trusted} of {len(solution.certificates)} certificates are trustworthy")

# %%
# The figure
# ----------
# Features that count get a small weight, the others a large one: the shrinking of large
# coefficients, the price of a single weight, is gone.
figure, panels = plt.subplots(2, 1, figsize=(6, 7))
panels[0].plot(solution.values, label="validation, a weight for each feature")
panels[0].plot(tests, label="test")
panels[0].axhline(
    by_grid[1], color="grey", linestyle="--", label="test, cross-validation"
)
panels[0].set(xlabel="update", ylabel="mean squared error", ylim=(None, 2.3))
panels[0].legend()
weights = solution.control["lasso"].exp()
panels[1].semilogy(
    range(N_TRUE), weights[:N_TRUE], "o", label="features that count"
)
panels[1].semilogy(
    range(N_TRUE, N_FEATURES), weights[N_TRUE:], ".", label="the others"
)
panels[1].axhline(
    weight, color="grey", linestyle="--", label="cross-validation"
)
panels[1].set(xlabel="feature", ylabel="weight of the lasso", ylim=(8e-3, None))
panels[1].legend(loc="lower right")
# sphinx_gallery_alt = "Errors along the descent, and the learned lasso weight of each feature"
plt.show()

# %%
assert solution.value < 0.7 * by_grid[0]
assert tests[-1] < by_grid[1]
assert trusted > 0.8 * len(solution.certificates)
