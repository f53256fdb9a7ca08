r"""
The van der Pol oscillator and what its multipliers say
=======================================================

The oscillator is brought towards rest with little force. The multiplier of a state is minus the
derivative of the cost in that state: pushing the state at any time and running on with the same
force changes the cost by just that much.
"""

# %%
# The dynamics, by the classical Runge-Kutta method; the third state gathers the cost.
import matplotlib.pyplot as plt
import torch

import bilevel as bl

N_STEPS, DURATION = 20, 2.0
DT = DURATION / N_STEPS


def field(x, u):
    """Time derivative of position, velocity and the cost so far."""
    cost = (x[0] ** 2 + x[1] ** 2 + u**2) / 2
    return torch.stack([x[1], (1 - x[0] ** 2) * x[1] - x[0] + u, cost])


def step(x, u, t):
    """One step of length DT."""
    k1 = field(x, u)
    k2 = field(x + DT / 2 * k1, u)
    k3 = field(x + DT / 2 * k2, u)
    k4 = field(x + DT * k3, u)
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


problem = bl.ControlProblem(bl.Map(step), lambda x, control: x[2], N_STEPS)
start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
rest = bl.PerStep.unstack(torch.zeros(N_STEPS, dtype=torch.float64))

# %%
# Five iterations, where a first-order method takes hundreds of gradients.
solution = bl.ControlSolver(problem, bl.Riccati()).solve(rest, start)
cost, iterations = solution.cost, solution.steps
print(f"cost {cost:.12f} after {iterations} iterations: {solution.reason}")

# %%
# The multipliers against differences: push the state at time t, and run on.
PUSH = 1e-5
slopes = torch.zeros(N_STEPS + 1, 3, dtype=torch.float64)
for t, state in enumerate(solution.adjoint.states):
    for i, push in enumerate(PUSH * torch.eye(3, dtype=torch.float64)):
        ends = []
        for x in (state + push, state - push):
            for u in solution.control.steps[t:]:
                x = step(x, u, 0)
            ends.append(x[2])
        slopes[t, i] = (ends[0] - ends[1]) / (2 * PUSH)
multipliers = torch.stack(solution.adjoint.multipliers)
multiplier_error = float((multipliers + slopes).abs().max())
print(f"largest difference from -dJ/du(t): {multiplier_error:.1e}")

# %%
# States, force and multipliers; the circles are the differences.
times = DT * torch.arange(N_STEPS + 1)
states = torch.stack(solution.adjoint.states)
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
axes[0].plot(times, states[:, :2], label=["position", "velocity"])
axes[1].step(times[:-1], torch.stack(solution.control.steps), where="post", color="C2")
axes[2].plot(times, multipliers[:, :2], label=["of position", "of velocity"])
axes[2].plot(times, -slopes[:, :2], "k.", markersize=3)
for ax, title in zip(axes, ("states", "force", "multipliers"), strict=True):
    ax.set(xlabel="time", title=title)
axes[0].legend()
axes[2].legend()
plt.show()
