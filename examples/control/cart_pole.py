r"""
A cart-pole in closed loop
==========================

A cart carries an upright pole one metre to the right. First a plan that ends at rest exactly: a box
on the force, and an end constraint met by an augmented Lagrangian. Then model-predictive control:
at every step the problem is solved anew from the state that noise and a blow left, over a horizon
that moves along, beginning with the last control shifted by one step.
"""

# %%
# The dynamics: position, angle from upright, and their speeds; mass of the cart 1 kg, of the pole
# 0.1 kg at half a metre.
import statistics
import time

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
    turn = (GRAVITY * sine - cosine * push) / (LENGTH * (4 / 3 - POLE * cosine**2 / (CART + POLE)))
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
planner = bl.ControlSolver(plan_problem, bl.Riccati(bounds=(-FORCE, FORCE), constraints=at_rest))
begin = bl.PerStep.unstack(torch.zeros(N_PLAN, 1, dtype=torch.float64))
plan = planner.solve(begin, start)
planned = torch.stack(plan.adjoint.states)
violation = float(plan.constraints.violation)
print(f"{plan.steps} iterations, cost {plan.cost:.4f}, end constraint violated by {violation:.1e}")
print(f"multipliers of the end {[round(x, 3) for x in plan.constraints.end_equality.tolist()]}")

# %%
# The loop. The horizon's end is held near rest by a terminal cost. A step takes a few iterations,
# since it begins where the last one ended.
N_HORIZON, BLOW = 20, 15
N_LOOP = 40


def terminal(state: Tensor, _control: bl.PerStep) -> Tensor:
    """Cost of not being at rest where the horizon ends."""
    position, angle, speed, rate = state
    return 20 * (1 - torch.cos(angle)) + 5 * position**2 + speed**2 + rate**2


problem = bl.ControlProblem(bl.Map(cart_pole), terminal, N_HORIZON, running)
controller = bl.ControlSolver(problem, bl.Riccati(bounds=(-FORCE, FORCE), tolerance=1e-5))
noise = torch.Generator().manual_seed(0)
state, control = start, bl.PerStep(plan.control.steps[:N_HORIZON])
states, forces, milliseconds, iterations = [state], [], [], []
for t in range(N_LOOP):
    began = time.perf_counter()
    solution = controller.solve(control, state)
    milliseconds.append(1e3 * (time.perf_counter() - began))
    iterations.append(solution.steps)
    force = solution.control.steps[0]
    shaken = 0.005 * torch.randn(4, generator=noise, dtype=torch.float64)
    state = cart_pole(state, force, t) + shaken
    if t == BLOW:
        state = state + torch.tensor([0.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    control = solution.control.shifted()
    states.append(state)
    forces.append(force)
path = torch.stack(states)
tilt = float(path[-10:, 1].abs().max())
median, often = statistics.median(milliseconds), statistics.median(iterations)
print(f"medians of a step: {median:.0f} ms, {often:.0f} iterations")
print(f"in the last ten steps the pole stays within {tilt:.3f} rad of upright")

# %%
# The plan, and the loop.
figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
after = torch.stack(plan.control.steps)[:, 0]
runs = ((planned, after, plan.adjoint.multipliers), (path, torch.stack(forces)[:, 0], None))
for (rows, force, multipliers), row, name in zip(runs, axes, ("plan", "loop"), strict=True):
    times = DT * torch.arange(len(rows))
    row[0].plot(times, rows[:, :2], label=["position [m]", "angle [rad]"])
    row[0].legend()
    row[1].step(times[:-1], force, where="post", color="C2")
    active = force.abs() == FORCE
    row[1].plot(times[:-1][active], force[active], ".", color="C3")
    titles = [f"{name}: state", f"{name}: force [N], at a bound in red"]
    if multipliers is not None:
        row[2].plot(times, torch.stack(multipliers))
        titles.append(f"{name}: multipliers")
    else:
        row[2].plot(times[:-1], milliseconds, ".")
        titles.append(f"{name}: milliseconds a step")
    for ax, title in zip(row, titles, strict=True):
        ax.set(xlabel="time [s]", title=title)
# sphinx_gallery_alt = "A cart moves its upright pole, by plan and through noise and a blow."
plt.show()

# %%
# What this page claims
assert plan.converged
assert violation < 1e-8
assert tilt < 0.2
