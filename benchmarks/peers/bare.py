"""Without any library: what a peer's time is to be compared with."""

import torch
from torch import Tensor

from benchmarks.peers.modules import Run
from benchmarks.ridge import CG_RTOL, Problem


def unrolled(problem: Problem, steps: int) -> Run:
    """A loop over `torch.autograd.grad`."""

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        w = problem.start.requires_grad_()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(problem.inner(w, alpha), w, create_graph=True)
            w = torch.sub(w, slope, alpha=problem.step_size)
        return torch.autograd.grad(problem.outer(w, alpha), alpha)[0]

    return run


def implicit(problem: Problem, steps: int) -> Run:
    """A loop that keeps no graph, and conjugate gradients on products through one kept graph."""

    def run() -> Tensor:
        w = problem.start
        for _ in range(steps):
            w.requires_grad_()
            (slope,) = torch.autograd.grad(problem.inner(w, problem.alpha), w)
            w = torch.sub(w.detach(), slope, alpha=problem.step_size)
        alpha, w = problem.alpha.detach().requires_grad_(), w.requires_grad_()
        (b,) = torch.autograd.grad(problem.outer(w, alpha), w)
        (slope,) = torch.autograd.grad(problem.inner(w, alpha), w, create_graph=True)
        x, r, p, size = torch.zeros_like(b), b, b, float(b @ b)
        enough = CG_RTOL**2 * size
        while size > enough:
            (product,) = torch.autograd.grad(slope, w, p, retain_graph=True)
            scale = size / float(p @ product)
            x, r = torch.add(x, p, alpha=scale), torch.sub(r, product, alpha=scale)
            size, before = float(r @ r), size
            p = torch.add(r, p, alpha=size / before)
        return -torch.autograd.grad(slope, alpha, x)[0]

    return run
