r"""
What does the expert care about? Costs learned from demonstrations
==================================================================

An expert drives a double integrator to the origin, by costs that nobody wrote down. From ten of its
trajectories the weights are learned: an optimal-control problem is the inner problem, and the
outer objective compares its optimum with what the expert did. The derivative of an optimum in the
weights takes one more sweep, for all ten problems at once.
"""

# %%
# The inner problem, as a function of the logarithms of its weights.
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_STEPS, N_SHOWN, UPDATES = 20, 10, 25
A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[0.005], [0.1]], dtype=torch.float64)
LIMIT = 2.0


def build(logs: Tensor) -> bl.ControlProblem:
    """A regulator with weights of position, velocity and force, the last 1."""
    weights = logs.exp()
    return bl.ControlProblem(
        bl.Map(lambda x, u, _t: A @ x + B @ u),
        terminal=lambda x, _control: (weights * x**2).sum(),
        running=lambda x, u, _t: (weights * x**2).sum() + u @ u,
        horizon=N_STEPS,
    )


solver = bl.ControlSolver(
    build, bl.Riccati(bounds=(-LIMIT, LIMIT), batched=True)
)
begin = bl.PerStep(
    [torch.zeros(N_SHOWN, 1, dtype=torch.float64) for _ in range(N_STEPS)]
)

# %%
# The demonstrations, some of them at the bounds of the force.
truth = torch.tensor([20.0, 3.0], dtype=torch.float64).log()
random = torch.Generator().manual_seed(0)
starts = torch.randn(N_SHOWN, 2, generator=random, dtype=torch.float64)
expert = solver.optimum(truth, starts, begin)
shown = torch.stack(expert.control.steps)
share = float((shown.abs() == LIMIT).double().mean())
print(f"{100 * share:.0f} % of the expert's forces are at a bound")

# %%
# Learning: the loss of the optimum, its gradient by `backward`, and L-BFGS. Each optimum begins
# where the last one was.
logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.LBFGS([logs], lr=0.5, max_iter=1)
losses, found = [], begin


def loss() -> Tensor:
    """Mean square of the difference from the expert's forces."""
    global found
    optimizer.zero_grad()
    best = solver.optimum(logs, starts, found)
    found = best.solution.control
    value = ((torch.stack(best.control.steps) - shown) ** 2).mean()
    value.backward()
    losses.append(float(value.detach()))
    return value


for _ in range(UPDATES):
    optimizer.step(loss)
learned = logs.detach().exp()
print(f"weights {learned.tolist()}, the expert's are {truth.exp().tolist()}")
print(f"loss from {losses[0]:.2e} to {losses[-1]:.2e}")

# %%
# The loss, and one demonstration with what the first and the last weights make of it.
figure, axes = plt.subplots(2, 1, figsize=(6, 6), layout="constrained")
axes[0].semilogy(losses)
axes[0].set(xlabel="update", ylabel="loss")
first = solver.optimum(torch.zeros(2, dtype=torch.float64), starts, begin)
for forces, style, name in (
    (shown, "C5o", "expert"),
    (torch.stack(first.control.steps), "C1--", "weights at first"),
    (torch.stack(found.steps), "C0", "weights learned"),
):
    axes[1].plot(forces[:, 0, 0], style, label=name)
axes[1].set(xlabel="step", ylabel="force of one demonstration")
axes[1].legend()
# sphinx_gallery_alt = "The loss falls by decades; the learned forces lie on those of the expert."
plt.show()

# %%
# What this page claims
assert float((learned / truth.exp() - 1).abs().max()) < 1e-2
assert 0 < share < 1
