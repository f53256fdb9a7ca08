r"""
A learned start: MAML and implicit MAML
=======================================

A family of tasks: each is a periodic curve, seen at six noisy points. Fitting one curve from zero
needs more points than that. Fitting it from a good start does not, and the start can be learned:
it is the outer variable of a bilevel problem, and the fits of all tasks are its inner problem.
"""

# %%
# A family of tasks
# -----------------
# Every curve is a sine wave of much the same height and place, plus small waves of its own. The
# model is a sum of waves with 13 coefficients. They are the params; those of all tasks lie on a
# first axis.
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_TASKS, N_POINTS, N_WAVES = 20, 6, 6
UPDATES = 100
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def waves(x: Tensor) -> Tensor:
    """1, sin(k x) and cos(k x): shape (..., points, 13)."""
    angle = x[..., None] * torch.arange(1, N_WAVES + 1)
    return torch.cat(
        [torch.ones_like(x)[..., None], angle.sin(), angle.cos()], -1
    )


MEAN = torch.zeros(1 + 2 * N_WAVES, dtype=torch.float64)
MEAN[1], MEAN[1 + N_WAVES], MEAN[2] = 2.0, 1.0, 0.7


def draw(n: int) -> dict[str, Tensor]:
    """n tasks: points that are seen, and coefficients of the true curves."""
    truth = MEAN + 0.25 * normal(n, len(MEAN)) / (
        1 + torch.arange(len(MEAN)) % N_WAVES
    )
    x = math.pi * (
        2 * torch.rand(n, N_POINTS, generator=generator, dtype=torch.float64)
        - 1
    )
    y = (waves(x) @ truth[..., None])[..., 0] + 0.2 * normal(n, N_POINTS)
    return {"x": x, "y": y, "truth": truth}


support, unseen = draw(N_TASKS), draw(N_TASKS)


def fit(params: Tensor, tasks: dict[str, Tensor]) -> Tensor:
    """Squared error at the points that are seen, summed over tasks."""
    predicted = (waves(tasks["x"]) @ params[..., None])[..., 0]
    return (predicted - tasks["y"]).square().mean(-1).sum() / 2


def distance(
    params: Tensor, _start: Tensor, tasks: dict[str, Tensor]
) -> Tensor:
    """Mean squared distance of a fitted curve from the true one."""
    return (params - tasks["truth"]).square().sum(-1).mean() / 2


# %%
# MAML: a few steps from the start
# --------------------------------
# Each task takes five steps of gradient descent from the learned start. These steps *are* the
# model: nothing is meant to converge, so the certificate judges against the steps made.
maml = bl.BilevelSolver(
    bl.BilevelProblem(
        inner=lambda params, _start, tasks: fit(params, tasks),
        outer=distance,
        start=lambda params, start: start.expand_as(params),
    ),
    bl.optim.SGD(0.2),
    inner_steps=5,
    method=bl.MLM(),
    certificate=bl.AgainstSteps(),
)
zeros = torch.zeros(N_TASKS, len(MEAN), dtype=torch.float64)
zero = torch.zeros(len(MEAN), dtype=torch.float64)


def adam(leaves: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(leaves, 0.1)


solution = maml.solve(zeros, zero, adam, UPDATES, [(support, support)])
print(solution.hypergradient.certificate)

# %%
# Implicit MAML: fit to the end, but held to the start
# ----------------------------------------------------
# Here each task is solved to convergence, with a term that holds it to the start. The hypergradient
# needs the solution alone, not the way there.
HOLD = 0.2
implicit_maml = bl.BilevelSolver(
    bl.BilevelProblem(
        inner=lambda params, start, tasks: (
            fit(params, tasks) + HOLD / 2 * (params - start).square().sum()
        ),
        outer=distance,
        start=lambda params, start: start.expand_as(params),
    ),
    bl.optim.SGD(0.4),
    inner_steps=100,
    method=bl.Implicit(),
)
implicit = implicit_maml.solve(zeros, zero, adam, UPDATES, [(support, support)])
print(implicit.hypergradient.certificate)

# %%
# On tasks that were never seen
# -----------------------------
errors = {
    "MAML, from zero": float(maml.value(zeros, zero, unseen, unseen)),
    "MAML, learned start": float(
        maml.value(zeros, solution.control, unseen, unseen)
    ),
    "implicit, from zero": float(
        implicit_maml.value(zeros, zero, unseen, unseen)
    ),
    "implicit, learned start": float(
        implicit_maml.value(zeros, implicit.control, unseen, unseen)
    ),
}
for name, error in errors.items():
    print(f"{name:24} mean squared distance {error:.3f}")

# %%
# The figure
# ----------
# Two unseen tasks: the true curve, its six points, and what five steps make of them.
fits = {
    "from zero": maml.advance(zeros, zero, unseen).state,
    "from the learned start": maml.advance(
        zeros, solution.control, unseen
    ).state,
}
grid = torch.linspace(-math.pi, math.pi, 200, dtype=torch.float64)
figure, panels = plt.subplots(2, 1, figsize=(6, 6), sharex=True)
for k, panel in enumerate(panels):
    panel.plot(
        grid,
        waves(grid) @ unseen["truth"][k],
        color="0.5",
        linewidth=4,
        alpha=0.5,
    )
    panel.plot(
        unseen["x"][k],
        unseen["y"][k],
        "o",
        color="0.5",
        label="the points seen",
    )
    panel.plot(
        grid,
        waves(grid) @ solution.control,
        ":",
        color="C0",
        label="learned start",
    )
    for name, colour in (("from zero", "C1"), ("from the learned start", "C0")):
        panel.plot(
            grid,
            waves(grid) @ fits[name][k],
            color=colour,
            label=f"5 steps {name}",
        )
    panel.set(ylabel="y")
panels[0].legend(fontsize="small")
panels[1].set(xlabel="x [rad]")
# sphinx_gallery_alt = "Two curves with six points each; fits from the learned start follow them"
plt.show()

# %%
assert errors["MAML, learned start"] < 0.2 * errors["MAML, from zero"]
assert errors["implicit, learned start"] < 0.2 * errors["implicit, from zero"]
