r"""
Swinging a pendulum up with little torque
=========================================

A torque box makes the pendulum swing back before it can swing up. `bilevel.Riccati` keeps the
bounds by projected Newton steps. Hanging at rest without torque is a stationary point of the
problem: there the solver says that it is no minimum, instead of calling it converged.
"""

# %%
# The dynamics: angle from hanging and its speed, a semi-implicit Euler step.
import warnings

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

DT, N_STEPS, TORQUE = 0.05, 80, 4.0


def swing(x: Tensor, u: Tensor, _t: int) -> Tensor:
    """One step of the pendulum; gravity pulls with 9.81 at right angles."""
    speed = x[1] + DT * (u[0] - 9.81 * torch.sin(x[0]) - 0.1 * x[1])
    return torch.stack([x[0] + DT * speed, speed])


problem = bl.ControlProblem(
    bl.Map(swing),
    terminal=lambda x, _control: 50 * (1 + torch.cos(x[0])) + 10 * x[1] ** 2,
    running=lambda x, u, _t: DT * (0.01 * u @ u + 1 + torch.cos(x[0])),
    horizon=N_STEPS,
)
hanging = torch.zeros(2, dtype=torch.float64)
solver = bl.ControlSolver(problem, bl.Riccati(bounds=(-TORQUE, TORQUE)))

# %%
# At rest the gradient is zero. That is not enough.
still = bl.PerStep.unstack(torch.zeros(N_STEPS, 1, dtype=torch.float64))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", bl.ConvergenceWarning)
    stuck = solver.solve(still, hanging)
print(f"gradient norm {stuck.gradient_norm:.1e}, converged: {stuck.converged}")
print(stuck.reason)

# %%
# A small push breaks the symmetry.
pushed = bl.PerStep.unstack(torch.full((N_STEPS, 1), 0.1, dtype=torch.float64))
solution = solver.solve(pushed, hanging, steps=200)
states = torch.stack(solution.adjoint.states)
torques = torch.stack(solution.control.steps)[:, 0]
active = torques.abs() == TORQUE
angle_error = abs(abs(float(states[-1, 0])) - torch.pi)
print(
    f"{solution.steps} iterations, cost {solution.cost:.4f}, "
    f"converged: {solution.converged}"
)
print(f"{int(active.sum())} of {N_STEPS} torques are at a bound")
print(
    f"largest shift of a Hessian on the way {max(solution.shifts):.1e}, "
    "at the end 0"
)

# %%
# States, torques with the bounds that are active, and multipliers.
times = DT * torch.arange(N_STEPS + 1)
figure, axes = plt.subplots(
    3, 1, figsize=(6, 7), sharex=True, layout="constrained"
)
axes[0].plot(times, states, label=["angle [rad]", "speed [rad/s]"])
for upright in (-torch.pi, torch.pi):
    axes[0].axhline(upright, color="grey", linewidth=0.5)
axes[1].step(times[:-1], torques, where="post", color="C2", label="torque")
axes[1].plot(
    times[:-1][active], torques[active], ".", color="C3", label="at a bound"
)
axes[2].plot(
    times,
    torch.stack(solution.adjoint.multipliers),
    label=["of angle", "of speed"],
)
for ax, title in zip(axes, ("states", "control", "multipliers"), strict=True):
    ax.set(ylabel=title)
    ax.legend()
axes[2].set_xlabel("time [s]")
# sphinx_gallery_alt = "A pendulum swings up, its torque between two bounds."
plt.show()

# %%
# What this page claims
assert not stuck.converged
assert solution.converged
assert bool((torques.abs() <= TORQUE).all())
assert angle_error < 0.1
