r"""
A learning rate for each step, learned
======================================

Ten steps of gradient descent, each with a learning rate of its own: which ten are best? They are a
control of the descent, so the hypergradient learns them. On quadratic problems the answer is
known, which makes this a test: the best rates turn out to be the inverse roots of a polynomial.
"""

# %%
# The problem
# -----------
# :math:`f(w) = \tfrac12 \sum_i \lambda_i (w_i - 1)^2` with curvatures from 0.05 to 1. What is
# judged is the distance from the minimiser after ten steps from zero.
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_STEPS, N_FEATURES, UPDATES = 10, 50, 150
curvature = torch.logspace(-1.3, 0, N_FEATURES, dtype=torch.float64)


def quadratic(w: Tensor, _rates: Tensor, _batch: object) -> Tensor:
    return (curvature * (w - 1).square()).sum() / 2


def distance(w: Tensor, _rates: Tensor, _batch: object) -> Tensor:
    return (w - 1).square().mean()


# %%
# The solver
# ----------
# Any setting of an inner optimiser may be a function of the control, and a ``ByStep`` of such
# functions. The ten steps are the model, nothing is to converge.
rate = bl.ByStep(lambda t: lambda log_rates: log_rates[t - 1].exp())
solver = bl.BilevelSolver(
    bl.BilevelProblem(quadratic, distance),
    bl.optim.SGD(rate),
    N_STEPS,
    bl.Unrolled(),
    certificate=bl.AgainstSteps(),
)
zero = torch.zeros(N_FEATURES, dtype=torch.float64)

# %%
# Equal rates are a saddle: by symmetry their ten derivatives are the same, and so they stay equal.
# The descent begins with unequal ones.
begin = torch.linspace(0, 2, N_STEPS, dtype=torch.float64)


def lbfgs(leaves: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        leaves, max_iter=UPDATES, line_search_fn="strong_wolfe"
    )


solution = solver.solve(zero, begin, lbfgs, steps=1)
learned = solution.control.exp()

# %%
# The answer
# ----------
# After ten steps a component of curvature :math:`\lambda` has the error
# :math:`p(\lambda) = \prod_t (1 - \eta_t \lambda)`: a polynomial of degree ten with
# :math:`p(0) = 1`. The one with the least mean square over all curvatures solves a linear least
# squares problem, and its roots are the inverse best rates.
powers = curvature[:, None] ** torch.arange(1, N_STEPS + 1)
coefficients = torch.linalg.lstsq(
    powers, -torch.ones_like(curvature)[:, None]
).solution
least = float((1 + powers @ coefficients).square().mean())

# The roots are the inverse eigenvalues of the companion matrix of the reversed
# polynomial.
companion = torch.diag(torch.ones(N_STEPS - 1, dtype=torch.float64), -1)
companion[0] = -coefficients[:, 0]
best = torch.linalg.eigvals(companion).real.sort().values

trials = torch.linspace(0.5, 2, 300, dtype=torch.float64)
constant = (1 - trials * curvature[:, None]).pow(2 * N_STEPS).mean(0)
print(f"least distance by the polynomial  {least:.10f}")
print(f"learned rates                     {solution.value:.10f}")
print(f"best constant rate                {float(constant.min()):.10f}")

# %%
# The figure
# ----------
# The learned rates are those of the polynomial; on a quadratic problem their order does not matter.
# Most of the way they are no better than the best constant rate, for they are made for ten steps.
# After ten they are a hundred times nearer.
plain = trials[constant.argmin()].expand(N_STEPS)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 6.5))
for name, rates, colour in (
    ("best constant rate", plain, "C1"),
    ("learned rates", learned, "C0"),
):
    left = torch.cumprod(
        1 - rates[:, None] * curvature, 0
    )  # errors after each step
    distances = torch.cat([torch.ones(1), left.square().mean(1)])
    top.semilogy(distances, "o-", color=colour, label=name)
top.set(xlabel="step", ylabel="mean squared distance")
top.legend()
steps = range(1, N_STEPS + 1)
bottom.semilogy(
    steps,
    best,
    "o",
    color="C2",
    markersize=10,
    alpha=0.5,
    label="from the polynomial",
)
bottom.semilogy(
    steps,
    learned.sort().values,
    "o-",
    color="C0",
    markersize=4,
    label="learned",
)
bottom.semilogy(steps, plain, color="C1", label="best constant")
bottom.set(xlabel="rate, in ascending order", ylabel="learning rate")
bottom.legend()
# sphinx_gallery_alt = "Distance by step, and the learned rates on those of the polynomial"
plt.show()

# %%
assert abs(solution.value / least - 1) < 1e-4
assert solution.value < 0.01 * float(constant.min())
assert bool((learned.sort().values / best - 1).abs().max() < 0.01)
