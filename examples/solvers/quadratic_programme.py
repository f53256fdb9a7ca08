r"""
The constraints of a quadratic programme, learned
=================================================

Somebody makes the best of limited means: :math:`\min_w \tfrac12 w^T Q w - p^T w` subject to
:math:`G w \le h`. We see the choices for many demands p, and not the limits h. They are found by
descent through the solution, posed in two ways that give one hypergradient: by the KKT conditions,
a root, and by the dual, a minimiser in a box.
"""

# %%
# The programme
# -------------
# Four quantities, five limits on sums of them, and 20 demands.
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N, LIMITS, DEMANDS, UPDATES = 4, 5, 20, 80
F64 = torch.float64
generator = torch.Generator().manual_seed(3)
half = torch.randn(N, N, generator=generator, dtype=F64)
Q = half @ half.T / N + torch.eye(N, dtype=F64)
G = torch.rand(LIMITS, N, generator=generator, dtype=F64)
demands = 4 * torch.rand(DEMANDS, N, generator=generator, dtype=F64)
true_limits = 0.4 + 0.8 * torch.rand(LIMITS, generator=generator, dtype=F64)
inverse = torch.linalg.inv(Q)
dual_matrix = G @ inverse @ G.T


def multipliers_of(limits: Tensor, found: Tensor, steps: int) -> Tensor:
    """Of all demands: plain steps on the dual, then exactly where not 0."""
    slope = demands @ inverse @ G.T - limits
    size = 1 / torch.linalg.matrix_norm(dual_matrix, 2)
    for _ in range(steps):
        found = (found + size * (slope - found @ dual_matrix)).clamp_min(0)
    for k, active in enumerate(found > 1e-9):
        found[k, active] = torch.linalg.solve(
            dual_matrix[active][:, active], slope[k, active]
        )
    return found


def choices(multipliers: Tensor) -> Tensor:
    return (demands - multipliers @ G) @ inverse


noise = 0.01 * torch.randn(DEMANDS, N, generator=generator, dtype=F64)
nothing = torch.zeros(DEMANDS, LIMITS, dtype=F64)
seen = choices(multipliers_of(true_limits, nothing, 3000)) + noise


# %%
# By its KKT conditions
# ---------------------
# The residual of the first is :math:`Q w - p + G^T \lambda`; of the second, in one equation,
# :math:`\min(\lambda, h - G w)`, which is zero where a limit binds or its multiplier is zero.
def kkt(
    pair: dict[str, Tensor], limits: Tensor, _batch: object
) -> dict[str, Tensor]:
    w, multipliers = pair["w"], pair["multipliers"]
    return {
        "w": w @ Q - demands + multipliers @ G,
        "multipliers": torch.minimum(multipliers, limits - w @ G.T),
    }


# A solver gets the last solution to start from: few steps do, once the first is
# found.
def both(
    pair: dict[str, Tensor], limits: Tensor, _batch: object
) -> dict[str, Tensor]:
    steps = 300 if pair["multipliers"].any() else 3000
    multipliers = multipliers_of(limits, pair["multipliers"], steps)
    return {"w": choices(multipliers), "multipliers": multipliers}


def miss(w: Tensor) -> Tensor:
    return (w - seen).square().sum(-1).mean()


by_kkt = bl.BilevelSolver(
    bl.BilevelProblem(
        residual=kkt, outer=lambda pair, _limits, _batch: miss(pair["w"])
    ),
    bl.Given(both),
    method=bl.Implicit(),
    on_failure="ignore",
)


# %%
# By its dual
# -----------
# :math:`\min_{\lambda \ge 0} \tfrac12 |\,p - G^T \lambda|^2_{Q^{-1}} + h^T \lambda`: an objective
# in a box, and proximal gradient is projection.
def dual(multipliers: Tensor, limits: Tensor, _batch: object) -> Tensor:
    left = demands - multipliers @ G
    return ((left @ inverse) * left).sum() / 2 + (multipliers * limits).sum()


step_size = float(1 / torch.linalg.matrix_norm(dual_matrix, 2))
rule = bl.optim.ProximalGradient(step_size, bl.prox.Box(lower=0.0))
by_dual = bl.BilevelSolver(
    bl.BilevelProblem(
        dual, lambda multipliers, _limits, _batch: miss(choices(multipliers))
    ),
    rule,
    inner_steps=1000,
    method=bl.Implicit(bl.linear.GMRES(restart=100)),
    on_failure="ignore",
)
limits = torch.full((LIMITS,), 0.4, dtype=F64)
pair = {"w": torch.zeros(DEMANDS, N, dtype=F64), "multipliers": nothing}
first, second = (
    by_kkt.hypergradient(pair, limits),
    by_dual.hypergradient(nothing, limits),
)
difference = float(
    (first.gradient - second.gradient).norm() / first.gradient.norm()
)
print(f"by KKT: {first.certificate}")
print(f"by the dual: {second.certificate}")
print(f"relative difference of the two hypergradients: {difference:.1e}")

# %%
# The limits
# ----------
# From tight ones, since a limit that binds nobody has no slope. The certificates are off here: the
# two above have told that these hypergradients are right.
solution = replace(by_kkt, certificate=None).solve(
    pair, limits, lambda leaves: torch.optim.Adam(leaves, 0.03), steps=UPDATES
)
off = (solution.control - true_limits).abs()
print(f"limits found {solution.control.tolist()}, true {true_limits.tolist()}")

# %%
# The figure
# ----------
# The miss falls to the noise of the choices, and the limits are those that were hidden.
figure, panels = plt.subplots(2, 1, figsize=(6, 7))
panels[0].semilogy(solution.values)
panels[0].axhline(
    float(noise.square().sum(-1).mean()),
    color="grey",
    linestyle="--",
    label="noise",
)
panels[0].set(xlabel="update", ylabel="mean squared miss")
panels[0].legend()
bars = {"true": true_limits, "found": solution.control, "at first": limits}
for k, (name, heights) in enumerate(bars.items()):
    panels[1].bar(
        [i + 0.2 * (k - 1) for i in range(LIMITS)],
        heights.tolist(),
        0.2,
        label=name,
    )
panels[1].set(xlabel="limit", ylabel="h")
panels[1].legend()
# sphinx_gallery_alt = "The miss along the descent down to the noise, and true and found limits"
plt.show()

# %%
assert difference < 1e-6
assert solution.value < 2 * float(noise.square().sum(-1).mean())
assert first.certificate.trustworthy
assert off.max() < 0.03
