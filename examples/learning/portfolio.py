r"""
A portfolio on the simplex
==========================

Shares of a portfolio are not negative and add up to one. The inner problem here chooses them by
mean and variance, on that simplex; the outer problem learns how far to believe the estimates that
it is given. Shares that are zero stay zero under a small change, and the hypergradient knows it.
"""

# %%
# Returns of twelve assets
# ------------------------
# Three factors move all of them. Each task is a window: 40 months to estimate from, and the 20
# months that follow, on which the portfolio is judged.
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_ASSETS, N_WINDOWS = 12, 4
generator = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


loadings, mean = normal(N_ASSETS, 3), 0.5 + 0.25 * normal(N_ASSETS)


def returns(months: int) -> Tensor:
    """In percent a month, shape (months, assets)."""
    return (
        mean + normal(months, 3) @ loadings.T + 1.5 * normal(months, N_ASSETS)
    )


def estimates(months: Tensor) -> dict[str, Tensor]:
    """Mean and covariance."""
    return {"mean": months.mean(0), "covariance": torch.cov(months.T)}


windows = [(estimates(returns(40)), returns(20)) for _ in range(N_WINDOWS)]
unseen = [(estimates(returns(40)), returns(20)) for _ in range(12)]


# %%
# The problem
# -----------
# Estimated means and covariances are noisy. The control shrinks each towards a plain guess: means
# towards their average, the covariance towards a multiple of the identity. The constraint is a
# proximal operator of the inner rule, and nothing else changes.
RISK = 0.3


def utility(shares: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean less a price of the variance."""
    return mean @ shares - RISK / 2 * shares @ covariance @ shares


def believed(
    control: dict[str, Tensor], known: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Shrunk estimates."""
    m, S = known["mean"], known["covariance"]
    a, b = control["mean"].sigmoid(), control["covariance"].sigmoid()
    flat = S.diagonal().mean() * torch.eye(N_ASSETS, dtype=S.dtype)
    return a * m + (1 - a) * m.mean(), b * S + (1 - b) * flat


problem = bl.BilevelProblem(
    inner=lambda shares, control, known: (
        -utility(shares, *believed(control, known))
    ),
    outer=lambda shares, _control, months: (
        -utility(shares, months.mean(0), torch.cov(months.T))
    ),
)
rule = bl.optim.ProximalGradient(0.2, bl.prox.Simplex(), accelerated=True)
solver = bl.BilevelSolver(
    problem, rule, inner_steps=60, method=bl.Implicit(bl.linear.GMRES())
)
equal = torch.full((N_ASSETS,), 1 / N_ASSETS, dtype=torch.float64)
start = {
    name: torch.tensor(2.0, dtype=torch.float64)
    for name in ("mean", "covariance")
}
one = solver.hypergradient(equal, start, *windows[0])
print(f"{int((one.params > 0).sum())} of {N_ASSETS} shares are not zero")
print("certificate:", one.certificate)

# %%
# Learning on all windows at once
# -------------------------------
# ``accumulate`` makes one update of the mean over the four windows.
found = solver.solve(
    equal,
    start,
    lambda leaves: torch.optim.Adam(leaves, 0.3),
    steps=12,
    batches=windows,
    accumulate=N_WINDOWS,
)


def score(control: dict[str, Tensor]) -> float:
    """Mean utility on windows that were never seen."""
    values = [solver.value(equal, control, *window) for window in unseen]
    return -float(torch.stack(values).mean())


even = -float(
    torch.stack(
        [problem.outer(equal, None, months) for _, months in unseen]
    ).mean()
)
scores = {
    "estimates as they are": score({n: 0 * x + 20 for n, x in start.items()}),
    "equal shares": even,
    "learned": score(found.control),
}
for name, number in scores.items():
    print(f"{name:22} utility on unseen months {number:.3f}")

# %%
# What the control does
# ---------------------
# Left, the shares of one window as the belief in its means grows: most of them are zero, and each
# kink is an asset that enters or leaves. Right, the objective along the updates.
beliefs = torch.linspace(-4, 4, 25, dtype=torch.float64)
paths = torch.stack(
    [
        rule.params(
            solver.advance(
                equal, {**found.control, "mean": belief}, windows[0][0]
            ).state
        )
        for belief in beliefs
    ]
)
figure, (above, below) = plt.subplots(2, 1, figsize=(6, 7))
above.plot(beliefs.sigmoid(), paths)
above.set(xlabel="belief in the estimated means", ylabel="share")
below.plot([-value for value in found.values])
below.set(xlabel="update", ylabel="utility on the months that follow")
# sphinx_gallery_alt = "Shares against a belief, most of them zero; the utility rises"
plt.show()

# %%
assert one.certificate.trustworthy
assert found.values[-1] < found.values[0]
assert scores["learned"] > max(
    scores["estimates as they are"], scores["equal shares"]
)
