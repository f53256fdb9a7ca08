r"""
Van der Pol: bring an oscillator to rest, and read the multipliers
==================================================================

A van der Pol oscillator starts at :math:`x(0) = (1, 0)`. A force :math:`u` should bring it towards
rest within two seconds, with little force:

.. math::
    \min_u \tfrac12 \int_0^2 x_1^2 + x_2^2 + u^2 \, dt, \qquad
    \dot x_1 = x_2, \quad \dot x_2 = (1 - x_1^2) x_2 - x_1 + u .

Time is cut into 20 steps, with a constant force on each. The least cost is then known to many
digits, 1.048392993799, and this script finds it. It also shows what a multiplier is.
"""

# %%
# The dynamics
# ------------
# A dynamics is a plain function of the state, the control of the step, and the number of the step.
# One step is the classical method of Runge and Kutta. The third state gathers the cost.
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_STEPS, DURATION = 20, 2.0
DT = DURATION / N_STEPS


def field(x: Tensor, u: Tensor) -> Tensor:
    """Time derivative of position, velocity and the cost spent so far."""
    spent = (x[0] ** 2 + x[1] ** 2 + u**2) / 2
    return torch.stack([x[1], (1 - x[0] ** 2) * x[1] - x[0] + u, spent])


def runge_kutta(x: Tensor, u: Tensor, _t: int) -> Tensor:
    """One step of length DT; the oscillator does not depend on the time."""
    k1 = field(x, u)
    k2 = field(x + DT / 2 * k1, u)
    k3 = field(x + DT / 2 * k2, u)
    k4 = field(x + DT * k3, u)
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


problem = bl.ControlProblem(
    bl.Map(runge_kutta), terminal=lambda x, _control: x[2], horizon=N_STEPS
)

# %%
# The best force
# --------------
# The control has one force a step. A solver takes its gradient, found by a forward sweep and a
# multiplier sweep, to any optimiser of ``torch.optim``; here L-BFGS.
start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
no_force = bl.PerStep(
    [torch.zeros((), dtype=torch.float64) for _ in range(N_STEPS)]
)


def lbfgs(leaves: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        leaves,
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )


solution = bl.ControlSolver(problem, lbfgs).solve(
    no_force, start, steps=2, tolerance=1e-7
)
print(
    f"cost {solution.costs[0]:.6f} without force, "
    f"{solution.cost:.12f} with the best one"
)

# %%
# The solution carries the residuals of the optimality conditions: the dynamics hold, the
# multipliers solve their recursion, and the gradient is zero.
residuals = solution.kkt
print(f"dynamics     {residuals.feasibility:.1e}")
print(f"multipliers  {residuals.costate:.1e}")
print(f"stationarity {residuals.stationarity:.1e}")

# %%
# What a multiplier is
# --------------------
# :math:`\lambda_t = -dJ/du(t)`: how much the cost falls for a small push of the state at step
# :math:`t`. So push each state a little, run on with the same forces, and compare.
states, multipliers = solution.adjoint.states, solution.adjoint.multipliers


def cost_from(t: int, x: Tensor) -> float:
    """The cost if the state at step t is x, with the forces found."""
    for k in range(t, N_STEPS):
        x = runge_kutta(x, solution.control.steps[k], k + 1)
    return float(x[2])


PUSH = 1e-5
pushed = torch.tensor(
    [
        [
            -(cost_from(t, x + push) - cost_from(t, x - push)) / (2 * PUSH)
            for push in PUSH * torch.eye(3, dtype=torch.float64)
        ]
        for t, x in enumerate(states)
    ],
    dtype=torch.float64,
)
multiplier_error = float((pushed - torch.stack(multipliers)).abs().max())
print(
    "largest difference between a multiplier and the effect of a push: "
    f"{multiplier_error:.1e}"
)

# %%
# The figure
# ----------
# Without force (dotted) the oscillator swings through to the other side. The best force slows it
# down, so that it is near zero when time is up. The multipliers (lines) agree with the pushes
# (dots). That of the velocity is the best force itself, but for the cut into steps: at the optimum
# a little more force costs what it gains.
free = bl.adjoint(problem, start, no_force, keep_states=True).states
time = torch.arange(N_STEPS + 1) * DT
forces = torch.stack(solution.control.steps)

figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 6), sharex=True)
for i, name in enumerate(["position", "velocity"]):
    top.plot(time, torch.stack(states)[:, i], color=f"C{i}", label=name)
    top.plot(time, torch.stack(free)[:, i], ":", color=f"C{i}")
top.stairs(forces, time, color="C2", linewidth=1.8, label="force")
top.set(ylabel="state, force (dotted: no force)")
top.legend(loc="lower left")
for i, name in enumerate(["position", "velocity"]):
    bottom.plot(
        time,
        torch.stack(multipliers)[:, i],
        color=f"C{i}",
        label=f"of the {name}",
    )
    bottom.plot(time, pushed[:, i], "o", color=f"C{i}", markersize=4)
bottom.stairs(forces, time, color="C2", linewidth=1.8, label="force")
bottom.set(xlabel="time [s]", ylabel="multiplier [cost per unit of state]")
bottom.legend()
# sphinx_gallery_alt = "States, force and multipliers of a van der Pol oscillator over two seconds"
plt.show()

# %%
assert abs(solution.cost - 1.048392993799) < 5e-13
assert max(residuals.feasibility, residuals.costate) < 1e-12
assert residuals.stationarity < 1e-7
assert multiplier_error < 1e-8
