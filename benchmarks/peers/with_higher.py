"""Unrolling by `higher`; it has no implicit mode."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.modules import Run, Weights
from benchmarks.ridge import Problem


def unrolled(problem: Problem, steps: int, rule: Callable = torch.optim.SGD) -> Run:
    import higher

    model = Weights(problem)
    optimizer = rule(model.parameters(), lr=problem.step_size)

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
            for _ in range(steps):
                differentiable.step(functional(alpha))
            (w,) = functional.parameters()
            return torch.autograd.grad(problem.outer(w, alpha), alpha)[0]

    return run
