"""MAML and implicit MAML: a starting point from which a few steps solve any task of a family.

Tasks are lines y = s x + o, each seen at few noisy points. The start is part of the control; the
params of all tasks lie on a leading axis.
"""

# %% A family of tasks, half of them kept apart
import torch
from torch import Tensor

import bilevel as bl

N_TASKS, N_POINTS = 12, 3
generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def lines(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (x, 1), noisy targets, and the true line of `n` tasks."""
    truth = torch.tensor([2.0, -1.0], dtype=torch.float64) + 0.3 * draw(n, 2)
    features = torch.stack([draw(n, N_POINTS), torch.ones(n, N_POINTS).double()], -1)
    return features, (features @ truth[..., None])[..., 0] + 0.2 * draw(n, N_POINTS), truth


support, unseen = lines(N_TASKS), lines(N_TASKS)


def fit(params: Tensor, tasks: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Squared error on the points that are seen."""
    features, targets, _ = tasks
    return ((features @ params[..., None])[..., 0] - targets).square().sum() / 2


def distance(params: Tensor, tasks: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared distance from the true lines: on what a task is judged."""
    return (params - tasks[2]).square().sum(-1).mean()


# %% MAML: three steps of gradient descent from the learned start, differentiated by MLM
maml = bl.BilevelSolver(
    bl.BilevelProblem(
        inner=lambda params, _start, tasks: fit(params, tasks),
        outer=lambda params, _start, tasks: distance(params, tasks),
        start=lambda params, start: start.expand_as(params),
    ),
    bl.optim.SGD(0.05),
    inner_steps=3,
    method=bl.MLM(),
    certificate=bl.AgainstSteps(),  # the three steps are the model: nothing is to converge
)
zeros = torch.zeros(N_TASKS, 2, dtype=torch.float64)
start = torch.zeros(2, dtype=torch.float64)
batches = [(support, support)]
found = maml.solve(zeros, start, lambda p: torch.optim.Adam(p, 0.1), 70, batches)

# %% Implicit MAML: each task is solved to the end, held to the start by a proximal term
STRENGTH = 2.0
imaml = bl.BilevelSolver(
    bl.BilevelProblem(
        inner=lambda params, start, tasks: (
            fit(params, tasks) + STRENGTH * (params - start).square().sum() / 2
        ),
        outer=lambda params, _start, tasks: distance(params, tasks),
        start=lambda params, start: start.expand_as(params),
    ),
    bl.optim.SGD(0.05),
    inner_steps=40,
    method=bl.Implicit(),
)
found_implicit = imaml.solve(zeros, start, lambda p: torch.optim.Adam(p, 0.1), 70, batches)

# %% On tasks that were never seen, the learned starts are the better ones
scores = {
    "MAML, start at zero": float(maml.value(zeros, start, unseen, unseen)),
    "MAML, learned start": float(maml.value(zeros, found.control, unseen, unseen)),
    "iMAML, start at zero": float(imaml.value(zeros, start, unseen, unseen)),
    "iMAML, learned start": float(imaml.value(zeros, found_implicit.control, unseen, unseen)),
}
for name, score in scores.items():
    print(f"{name:22} mean squared distance {score:.3f}")
print("certificate:", found_implicit.hypergradient.certificate)
