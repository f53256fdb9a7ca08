r"""
A linear-quadratic regulator in one iteration
=============================================

A linear dynamics with quadratic costs is solved by one Riccati sweep, so that `bilevel.Riccati`
takes one iteration. With the solution of the discrete algebraic Riccati equation as terminal cost,
its feedback is the one that `scipy.linalg.solve_discrete_are` gives, at every step.
"""

# %%
# The problem: a double integrator, sampled ten times a second, with the infinite horizon's value as
# terminal cost.
import matplotlib.pyplot as plt
import torch
from scipy.linalg import solve_discrete_are

import bilevel as bl

A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[0.005], [0.1]], dtype=torch.float64)
Q, R = (
    torch.eye(2, dtype=torch.float64),
    0.1 * torch.eye(1, dtype=torch.float64),
)
P = torch.as_tensor(
    solve_discrete_are(A.numpy(), B.numpy(), Q.numpy(), R.numpy())
)
N_STEPS = 50

problem = bl.ControlProblem(
    bl.Map(lambda x, u, _t: A @ x + B @ u),
    terminal=lambda x, _control: x @ P @ x / 2,
    running=lambda x, u, _t: (x @ Q @ x + u @ R @ u) / 2,
    horizon=N_STEPS,
)
start = torch.tensor([1.0, 0.0], dtype=torch.float64)
rest = bl.PerStep.unstack(torch.zeros(N_STEPS, 1, dtype=torch.float64))

# %%
# One iteration. The record prints in a few lines.
solution = bl.ControlSolver(problem, bl.Riccati()).solve(rest, start)
print(solution)

# %%
# Against scipy: the controls are -K x, the cost x P x / 2, the multipliers -P x.
K = torch.linalg.solve(R + B.mT @ P @ B, B.mT @ P @ A)
states = torch.stack(solution.adjoint.states)
controls = torch.stack(solution.control.steps)
multipliers = torch.stack(solution.adjoint.multipliers)
control_error = float((controls + states[:-1] @ K.mT).abs().max())
cost_error = abs(solution.cost - float(start @ P @ start) / 2)
multiplier_error = float((multipliers + states @ P).abs().max())
print(
    f"controls differ from -K x by {control_error:.1e}, "
    f"the cost by {cost_error:.1e},"
)
print(f"multipliers from -P x by {multiplier_error:.1e}")

# %%
# States, controls and multipliers over the steps.
figure, axes = plt.subplots(
    3, 1, figsize=(6, 7), sharex=True, layout="constrained"
)
axes[0].plot(states, label=["position", "velocity"])
axes[1].step(
    range(N_STEPS), controls[:, 0], where="post", color="C2", label="force"
)
axes[2].plot(multipliers, label=["of position", "of velocity"])
for ax, title in zip(axes, ("states", "control", "multipliers"), strict=True):
    ax.set(ylabel=title)
    ax.legend()
axes[2].set_xlabel("step")
# sphinx_gallery_alt = "Position, velocity, force and multipliers of a regulator over fifty steps."
plt.show()

# %%
# What this page claims
assert solution.converged
assert solution.steps == 1
assert max(control_error, cost_error, multiplier_error) < 1e-11
