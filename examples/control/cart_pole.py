r"""
A cart-pole from rest to rest
=============================

A cart carries an upright pole one metre to the right. The plan keeps a box on the force by
projected Newton steps, and ends at rest exactly: an end constraint, met by an augmented Lagrangian.
"""

# %%
# The dynamics: position, angle from upright, and their speeds; mass of the cart 1 kg, of the pole
# 0.1 kg at half a metre.
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl
from bilevel.control import Constraints

torch.set_num_threads(1)
DT, FORCE = 0.08, 3.0
CART, POLE, LENGTH, GRAVITY = 1.0, 0.1, 0.5, 9.81


def cart_pole(state: Tensor, force: Tensor, _t: int) -> Tensor:
    """One semi-implicit Euler step."""
    position, angle, speed, rate = state
    sine, cosine = torch.sin(angle), torch.cos(angle)
    push = (force[0] + POLE * LENGTH * rate**2 * sine) / (CART + POLE)
    turn = (GRAVITY * sine - cosine * push) / (
        LENGTH * (4 / 3 - POLE * cosine**2 / (CART + POLE))
    )
    speed = speed + DT * (push - POLE * LENGTH * turn * cosine / (CART + POLE))
    rate = rate + DT * turn
    return torch.stack([position + DT * speed, angle + DT * rate, speed, rate])


def running(state: Tensor, force: Tensor, _t: int) -> Tensor:
    """Little force, an upright pole, and the cart near its place."""
    position, angle, speed, rate = state
    away = 2 * (1 - torch.cos(angle)) + position**2 + 0.1 * (speed**2 + rate**2)
    return DT * (away + 0.002 * force @ force)


start = torch.tensor([-1.0, 0.0, 0.0, 0.0], dtype=torch.float64)

# %%
# The plan: 2.4 seconds, at rest at the end. The cart first goes the wrong way, to tilt the pole.
N_PLAN = 30
plan_problem = bl.ControlProblem(
    bl.Map(cart_pole), lambda state, _control: 0 * state.sum(), N_PLAN, running
)
at_rest = Constraints(end_equality=lambda state, _control: state)
planner = bl.ControlSolver(
    plan_problem, bl.Riccati(bounds=(-FORCE, FORCE), constraints=at_rest)
)
begin = bl.PerStep.unstack(torch.zeros(N_PLAN, 1, dtype=torch.float64))
plan = planner.solve(begin, start)
planned = torch.stack(plan.adjoint.states)
violation = float(plan.constraints.violation)
print(
    f"{plan.steps} iterations, cost {plan.cost:.4f}, "
    f"end constraint violated by {violation:.1e}"
)
at_the_end = plan.constraints.end_equality.tolist()
print(f"multipliers of the end {[round(x, 3) for x in at_the_end]}")

# %%
# State, force with its active bounds, and multipliers.
force = torch.stack(plan.control.steps)[:, 0]
active = force.abs() == FORCE
times = DT * torch.arange(N_PLAN + 1)
figure, axes = plt.subplots(
    3, 1, figsize=(6, 7), sharex=True, layout="constrained"
)
axes[0].plot(times, planned[:, :2], label=["position [m]", "angle [rad]"])
axes[1].step(times[:-1], force, where="post", color="C2", label="force [N]")
axes[1].plot(
    times[:-1][active], force[active], ".", color="C3", label="at a bound"
)
names = ["of position", "of angle", "of speed", "of rate of turning"]
axes[2].plot(times, torch.stack(plan.adjoint.multipliers), label=names)
for ax, title in zip(axes, ("state", "control", "multipliers"), strict=True):
    ax.set(ylabel=title)
    ax.legend()
axes[2].set_xlabel("time [s]")
# sphinx_gallery_alt = "A cart moves its upright pole, its force between two bounds at first."
plt.show()

# %%
# What this page claims
assert plan.converged
assert violation < 1e-8
assert bool((force.abs() <= FORCE).all())
