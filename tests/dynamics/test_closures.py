"""Modules that a step closes over: their buffers count the steps, and no evaluation again."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from problems import real, square
from torch import nn

import bilevel as bl
from bilevel.dynamics.closures import buffers_kept, modules_of

T = 6
U, C = real(1, 5, 3), torch.tensor(0.1, dtype=torch.float64)
layer = nn.BatchNorm1d(3).double().requires_grad_(requires_grad=False)


def with_global(u, c, t):
    return u + c * torch.tanh(layer(u))


def helped(net, u, c, t):
    return u + c * torch.tanh(net(u))


@dataclass(frozen=True)
class Own(bl.Dynamics):
    net: nn.Module

    def step(self, state, control, t):
        return helped(self.net, state, control, t)


class Holder:
    def __init__(self, net):
        self.parts = {"net": [net]}

    def step(self, u, c, t):
        return helped(self.parts["net"][0], u, c, t)


CLOSURES = {
    "global": lambda net: bl.Map(with_global),
    "closure": lambda net: bl.Map(lambda u, c, t: u + c * torch.tanh(net(u))),
    "partial": lambda net: bl.Map(partial(helped, net)),
    "default": lambda net: bl.Map(lambda u, c, t, net=net: helped(net, u, c, t)),
    "field": Own,
    "method": lambda net: bl.Map(Holder(net).step),
    "function inside": lambda net: bl.Map(lambda u, c, t: (lambda v: helped(net, v, c, t))(u)),
}
SWEEPS = {
    "adjoint": lambda p, chosen: bl.adjoint(p, U, C, checkpointing=chosen),
    "hvp": lambda p, chosen: bl.hvp(p, U, C, C, checkpointing=chosen),
    "rollout": lambda p, chosen: (
        bl.rollout(p.dynamics, U, C.clone().requires_grad_(), T, checkpointing=chosen)
        .sum()
        .backward()
    ),
    "total cost": lambda p, chosen: bl.total_cost(p, U, C, checkpointing=chosen),
}
PATHS = [None, bl.Checkpointing(snapshots=1), bl.Checkpointing(block=4), bl.Budget("64 KiB")]


def batch_norm(closure):
    net = layer if closure == "global" else nn.BatchNorm1d(3).double().requires_grad_(False)
    net.reset_running_stats()
    return net


@pytest.mark.parametrize("closure", CLOSURES)
def test_a_batch_norm_is_found_wherever_a_step_has_it_from(closure):
    net = batch_norm(closure)
    assert any(one is net for one in modules_of(CLOSURES[closure](net)))


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_batch_norm_counts_each_step_once(sweep, path):
    net = batch_norm("closure")
    dynamics = CLOSURES["closure"](net)
    SWEEPS[sweep](bl.ControlProblem(dynamics, lambda u, c: square(u), T), path)
    found = net.num_batches_tracked.item(), net.running_mean.clone()
    net.reset_running_stats()
    bl.rollout(dynamics, U, C, T)
    assert found[0] == T
    torch.testing.assert_close(found[1], net.running_mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("closure", CLOSURES)
def test_every_way_to_it_counts_each_step_once(closure):
    net = batch_norm(closure)
    problem = bl.ControlProblem(CLOSURES[closure](net), lambda u, c: square(u), T)
    bl.adjoint(problem, U, C)
    assert net.num_batches_tracked.item() == T


def test_one_in_a_running_cost_counts_each_step_once():
    net = batch_norm("closure")
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u * c), lambda u, c: square(u), T, lambda u, c, t: square(net(u))
    )
    bl.adjoint(problem, U, C)
    assert net.num_batches_tracked.item() == T


def test_a_buffer_that_is_assigned_anew_is_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.tensor(0))

        def forward(self, u):
            self.n = self.n + 1
            return u

    net = Counting()
    with buffers_kept(lambda u: net(u)):
        net(1)
    assert net.n.item() == 0


def test_what_is_large_or_circular_is_no_trouble():
    circle = []
    circle.append(circle)
    data = [*range(100_000)]
    assert modules_of(lambda: (circle, data)) == []
