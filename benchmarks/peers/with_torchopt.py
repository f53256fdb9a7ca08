"""Unrolling by TorchOpt's explicit gradient, and its implicit one."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.modules import Run
from benchmarks.ridge import CG_RTOL, Problem


def unrolled(problem: Problem, steps: int, rule: Callable | None = None) -> Run:
    import torchopt

    rule = rule or torchopt.sgd

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        params = (problem.start.requires_grad_(),)
        optimizer = torchopt.FuncOptimizer(rule(lr=problem.step_size))
        for _ in range(steps):
            params = optimizer.step(problem.inner(params[0], alpha), params)
        return torch.autograd.grad(problem.outer(params[0], alpha), alpha)[0]

    return run


def differentiable_solution(
    problem: Problem, steps: int, linear_solver: Callable | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Inner solution from a start and a control; implicitly differentiable in the control."""
    import torchopt

    linear_solver = linear_solver or torchopt.linear_solve.solve_cg(rtol=CG_RTOL)
    stationary = torch.func.grad(lambda w, alpha: problem.inner(w, alpha))

    @torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=linear_solver)
    def solve(start: Tensor, alpha: Tensor) -> Tensor:
        w = start
        for _ in range(steps):
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                (slope,) = torch.autograd.grad(problem.inner(w, alpha), w)
            w = torch.sub(w.detach(), slope, alpha=problem.step_size)
        return w

    return solve


def _implicit(problem: Problem, steps: int, linear_solver: Callable | None = None) -> Run:
    solve = differentiable_solution(problem, steps, linear_solver)

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        return torch.autograd.grad(problem.outer(solve(problem.start, alpha), alpha), alpha)[0]

    return run


def cg(problem: Problem, steps: int) -> Run:
    return _implicit(problem, steps)


def neumann(problem: Problem, steps: int) -> Run:
    import torchopt

    series = torchopt.linear_solve.solve_inv(ns=True, maxiter=steps, alpha=problem.step_size)
    return _implicit(problem, steps, series)
