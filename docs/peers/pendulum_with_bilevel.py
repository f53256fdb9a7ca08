import torch

import bilevel as bl


def field(state, damping):
    angle, speed = state
    return speed, -torch.sin(angle) - damping * speed


def midpoint(state, damping, t):
    half = tuple(x + 0.05 * dx for x, dx in zip(state, field(state, damping)))
    return tuple(x + 0.1 * dx for x, dx in zip(state, field(half, damping)))


problem = bl.ControlProblem(
    bl.Map(midpoint), lambda x, damping: x[0] ** 2, horizon=40
)
state = (torch.tensor(1.0).double(), torch.tensor(0.0).double())
print(bl.adjoint(problem, state, torch.tensor(0.3).double()).gradient)
