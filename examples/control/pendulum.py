r"""
Swing up a pendulum with a weak motor
=====================================

A pendulum hangs down and should stand up after four seconds. Its motor is too weak to lift it:
the largest torque holds it at 30 degrees only. So it has to swing, first to one side and then to
the other. The best torques are found from nothing by the multipliers of the trajectory.
"""

# %%
# The dynamics
# ------------
# The state is angle and angular velocity; the angle is zero where the pendulum hangs. The control
# of a step is any real number, and the torque is a bounded function of it.
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_STEPS, DURATION = 60, 4.0  # s
ITERATIONS = 150
GRAVITY, DAMPING = 9.81, 0.1  # of a pendulum of 1 m and 1 kg
STRONGEST = GRAVITY / 2  # torque [N m]
DT = DURATION / N_STEPS


def torque(control: Tensor) -> Tensor:
    return STRONGEST * torch.tanh(control)


def step(state: Tensor, control: Tensor, _t: int) -> Tensor:
    """One step of length DT: first the velocity, then the angle."""
    angle, velocity = state
    velocity = velocity + DT * (
        torque(control) - GRAVITY * angle.sin() - DAMPING * velocity
    )
    return torch.stack([angle + DT * velocity, velocity])


# %%
# The cost
# --------
# Height and speed that are missing at the end, and a little for each torque on the way. Height is
# a function of the angle that knows of full turns.
def missed(state: Tensor, _control: bl.PerStep) -> Tensor:
    angle, velocity = state
    return 20 * (1 + angle.cos()) + 2 * velocity**2


def effort(_state: Tensor, control: Tensor, _t: int) -> Tensor:
    return 0.01 * DT * torque(control) ** 2


problem = bl.ControlProblem(bl.Map(step), missed, N_STEPS, running=effort)
hanging = torch.zeros(2, dtype=torch.float64)
idle = bl.PerStep(
    [torch.full((), 0.01, dtype=torch.float64) for _ in range(N_STEPS)]
)


# %%
# The solver
# ----------
# L-BFGS, with the gradient from two sweeps. Sixty steps are few, so all their graphs are kept.
def lbfgs(leaves: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        leaves,
        max_iter=ITERATIONS,
        history_size=20,
        line_search_fn="strong_wolfe",
    )


solver = bl.ControlSolver(problem, lbfgs, bl.Checkpointing(block=None))
solution = solver.solve(idle, hanging, steps=1)
angle, velocity = solution.adjoint.final_state.tolist()
miss = 180 - abs(math.degrees(angle))
print(f"cost {solution.costs[0]:.2f} at first, {solution.cost:.4f} in the end")
print(f"it ends {miss:.2f} degrees from upright, with {velocity:.4f} rad/s")

# %%
# The figure
# ----------
# The motor pushes with the swing, to both sides in turn, until there is energy enough. Below, the
# pendulum at each step, from dark (it hangs) to light (it stands).
states = torch.stack(solution.adjoint.states)
torques = torque(torch.stack(solution.control.steps))
time = torch.arange(N_STEPS + 1) * DT

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(6, 7.5), height_ratios=[2, 3]
)
top.plot(time, torch.rad2deg(states[:, 0]), color="C0")
top.axhline(math.copysign(180, angle), color="C0", linewidth=0.8, linestyle=":")
top.set(xlabel="time [s]")
top.set_ylabel("angle [degrees]", color="C0")
right = top.twinx()
right.stairs(torques, time, color="C1", linewidth=1.8)
right.set_ylabel("torque [N m]", color="C1")
right.set_ylim(-2.5 * STRONGEST, 2.5 * STRONGEST)

colours = plt.get_cmap("viridis")(
    torch.linspace(0.15, 0.9, N_STEPS + 1).tolist()
)
for x, colour in zip(states[:, 0], colours, strict=True):
    bottom.plot(
        [0, x.sin()], [0, -x.cos()], color=colour, linewidth=1, alpha=0.5
    )
    bottom.plot(x.sin(), -x.cos(), "o", color=colour)
bottom.set(aspect="equal", xlabel="x [m]", ylabel="height [m]")
# sphinx_gallery_alt = "Angle and torque over four seconds; the pendulum swings twice, then stands"
plt.show()

# %%
assert miss < 1
assert abs(velocity) < 0.05
assert STRONGEST < GRAVITY  # too weak to lift it at once
