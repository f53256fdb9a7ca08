r"""
Memory against the number of steps, measured
============================================

Plain autograd keeps the graph of every step, so its memory grows with the horizon T. A multiplier
sweep needs one graph at a time. It keeps all states, or a few of them and computes the others
again, whatever a budget in bytes allows. The gradient is the same, to the last digit.
"""

# %%
# A long dynamics
# ---------------
# A layer that is applied again and again, with weights shared by all steps: 64 rows of 64 features,
# 32 KiB a state.
import time
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

SIZE = 64
HORIZONS = (10, 30, 100, 300, 1000)
REPEATS = 3
BUDGET = "1 MiB"
generator = torch.Generator().manual_seed(0)
start = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
weights = (
    torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    / SIZE**0.5
)


def step(state: Tensor, weights: Tensor, _t: int) -> Tensor:
    return torch.tanh(state @ weights) + 0.5 * state


def cost(state: Tensor, _weights: Tensor) -> Tensor:
    return state.square().mean()


# %%
# Four ways to the same gradient
# ------------------------------
def autograd(horizon: int) -> Tensor:
    """Plain torch: a loop and one call of ``grad``."""
    theta, state = weights.clone().requires_grad_(), start
    for t in range(horizon):
        state = step(state, theta, t + 1)
    return torch.autograd.grad(cost(state, theta), theta)[0]


def sweep(horizon: int, kept: bl.Checkpointing | bl.Budget) -> Tensor:
    problem = bl.ControlProblem(bl.Map(step), cost, horizon)
    return bl.adjoint(problem, start, weights, checkpointing=kept).gradient


ways = {
    "autograd": autograd,
    "all graphs kept": lambda horizon: sweep(
        horizon, bl.Checkpointing(block=None)
    ),
    "all states kept": lambda horizon: sweep(horizon, bl.Checkpointing()),
    f'Budget("{BUDGET}")': lambda horizon: sweep(horizon, bl.Budget(BUDGET)),
}

# %%
# The measurement
# ---------------
# ``LiveBytes`` counts the tensors that are alive, which is what a budget is about; the size of the
# process also holds what its allocator has not given back.
MIB = 2**20
mebibytes: dict[str, list[float]] = {name: [] for name in ways}
seconds: dict[str, list[float]] = {name: [] for name in ways}
differences = []
for horizon in HORIZONS:
    expected = autograd(horizon)
    for name, way in ways.items():
        taken = []
        for _ in range(REPEATS):
            began = time.process_time()
            gradient = way(horizon)
            taken.append(time.process_time() - began)
        seconds[name].append(median(taken))
        differences.append(
            float((gradient - expected).norm() / expected.norm())
        )
        with bl.sweeps.LiveBytes() as live:
            way(horizon)
        mebibytes[name].append(live.peak / MIB)

print(f"T = {HORIZONS[-1]}              MiB   seconds")
for name in ways:
    print(f"{name:16} {mebibytes[name][-1]:10.2f} {seconds[name][-1]:9.3f}")
print(f"largest difference between two gradients: {max(differences):.1e}")

# %%
# The figure
# ----------
# Graphs grow with T, and states too, half as fast here. The budget is met at every T. It costs
# time, in that steps are evaluated again; but it tapes blocks of steps at once, which for steps as
# small as these saves more. All axes are logarithmic.
figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 6.5), sharex=True)
for k, name in enumerate(ways):
    style = {
        "color": f"C{k}",
        "linewidth": 5 if k == 0 else 1.8,
        "alpha": 0.4 if k == 0 else 1,
    }
    top.loglog(HORIZONS, mebibytes[name], "o-", label=name, **style)
    bottom.loglog(HORIZONS, seconds[name], "o-", **style)
top.set(ylabel="peak of live memory [MiB]")
top.legend()
bottom.set(xlabel="number of steps T", ylabel="time of a gradient [s]")
# sphinx_gallery_alt = "Memory and time of a gradient by the number of steps, for four ways"
plt.show()

# %%
assert max(differences) < 1e-12
assert max(mebibytes[f'Budget("{BUDGET}")']) <= 1.1
assert mebibytes["autograd"][-1] > HORIZONS[-1] / 20  # MiB
