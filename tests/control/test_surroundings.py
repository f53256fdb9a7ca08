"""Autocast, the default device, and the caller's tensors: as the forward sweep found them."""

import pytest
import torch
from choices import CHECKPOINTINGS
from problems import real

import bilevel as bl
from bilevel.errors import ArgumentError, LostGradientError
from bilevel.sweeps.memory import LiveBytes

every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)


def autocast(**settings):
    return torch.autocast("cpu", dtype=torch.bfloat16, **settings)


def net(u, w, t):
    return torch.tanh(u @ w).float()


def weights(size=16):
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(size, size, generator=generator)


@every_checkpointing
@pytest.mark.parametrize("outside", [True, False])
def test_autocast_is_that_of_the_forward_pass(checkpointing, outside):
    w, u = weights().requires_grad_(), weights()[:4]
    # Without copies that are kept, gradients of a weight are summed in float32 in both.
    with autocast(cache_enabled=False):
        state = u
        for t in range(1, 6):
            state = net(state, w, t)
        loss = (state**2).sum()
    (expected,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(expected.sum(), w)
    with autocast(cache_enabled=False):
        loss = (bl.rollout(bl.Map(net), u, w, 5, checkpointing=checkpointing) ** 2).sum()
        if not outside:
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    if outside:
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    again = torch.autograd.grad(gradient.sum(), w)[0]
    assert (again - second).norm() < 0.05 * second.norm()  # of 8 bits


@pytest.mark.parametrize("checkpointing", [c for c in CHECKPOINTINGS if c.block], ids=repr)
def test_a_forward_outside_of_autocast_is_replayed_outside(checkpointing):
    w, u = weights().requires_grad_(), weights()[:4]
    expected, found = (
        (bl.rollout(bl.Map(net), u, w, 5, checkpointing=c) ** 2).sum()
        for c in (bl.Checkpointing(block=None), checkpointing)
    )
    (expected,) = torch.autograd.grad(expected, w)
    with autocast():
        (gradient,) = torch.autograd.grad(found, w)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("updates", [17])
def test_a_sweep_inside_autocast_keeps_no_copies_of_the_weights(updates):
    w, u = weights(64), weights(64)[:1]
    problem = bl.ControlProblem(bl.Map(net), lambda u, w: (u @ w).float().sum(), 3)
    with autocast(), LiveBytes() as live:
        for _ in range(updates):
            bl.adjoint(problem, u, w)
        assert live.now < w.nbytes / 2


def test_inner_steps_inside_autocast_keep_no_copies_of_the_params():
    w, x = weights(64), weights(64)[:1]
    problem = bl.BilevelProblem(
        lambda w, a, b: ((x @ w).float() ** 2).sum() + a * (w**2).sum(),
        lambda w, a, b: ((x @ w).float() ** 2).sum(),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.01), 17, bl.MLM(), certificate=None)
    with autocast(), LiveBytes() as live:
        solver.hypergradient(w, torch.tensor(0.1))
        assert live.now < w.nbytes


def test_the_default_device_is_that_of_the_forward_pass():
    def step(u, c, t):
        seen.append(torch.empty(0).device.type)
        return u * c

    seen = []
    u, c = torch.ones(2), torch.tensor(0.5, requires_grad=True)
    with torch.device("meta"):
        loss = bl.rollout(bl.Map(step), u, c, 3).sum()
    loss.backward()
    assert set(seen) == {"meta"}


@every_checkpointing
def test_no_state_that_is_returned_is_a_tensor_of_the_caller(checkpointing):
    for step in (lambda u, c, t: u + 0 * c, lambda u, c, t: c, lambda u, c, t: c.view_as(c)):
        for horizon in (0, 1, 3):
            u, c = real(1, 3), real(2, 3)
            kept = u.clone(), c.clone()
            problem = bl.ControlProblem(bl.Map(step), lambda u, c: (u * c).sum(), horizon)
            swept = bl.adjoint(problem, u, c, checkpointing=checkpointing, keep_states=True)
            for state in (*swept.states, swept.final_state):
                state.add_(1.0)
            bl.rollout(bl.Map(step), u, c, horizon, checkpointing=checkpointing).add_(1.0)
            assert torch.equal(u, kept[0])
            assert torch.equal(c, kept[1])


@every_checkpointing
@pytest.mark.parametrize("quietly", [True, False])
def test_a_step_that_writes_is_refused_before_it_reached_the_observation(checkpointing, quietly):
    def step(u, c, t):
        if quietly:
            with torch.no_grad():
                u += c
        else:
            u += c
        return u

    u, c = real(1, 3), real(2, 3)
    kept = u.clone()
    problem = bl.ControlProblem(bl.Map(step), lambda u, c: (u * c).sum(), 3)
    with pytest.raises(ArgumentError, match="in place"):
        bl.adjoint(problem, u, c, checkpointing=checkpointing)
    with pytest.raises(ArgumentError, match="in place"):
        bl.rollout(bl.Map(step), u, c, 3, checkpointing=checkpointing)
    assert torch.equal(u, kept)


@every_checkpointing
def test_each_place_of_a_tensor_that_stands_in_several_has_its_own_gradient(checkpointing):
    u, w = real(1, 3), real(2, 3)

    def both(u, c, t):
        return torch.tanh(u * c["a"] + c["b"] ** 2)

    def one(u, c, t):
        return torch.tanh(u * c)

    tied = [(both, {"a": w, "b": w}), (one, bl.PerStep([w, w, w]))]
    for step, control in tied:
        apart = bl.tree.copied(control)
        problem = bl.ControlProblem(bl.Map(step), lambda u, c: (u**2).sum(), 3)
        results = []
        for theta in (control, apart):
            swept = bl.adjoint(problem, u, theta, checkpointing=checkpointing)
            product = bl.hvp(problem, u, theta, apart, checkpointing=checkpointing).product
            results.append(bl.tree.leaves_of((swept.gradient, product)))
        results = [[x for x in found if x is not None] for found in results]
        for tied_one, apart_one in zip(*results, strict=True):
            assert torch.equal(tied_one, apart_one)
        leaf = w.clone().requires_grad_()
        repeated = {"a": leaf, "b": leaf} if step is both else bl.PerStep([leaf] * 3)
        final = bl.rollout(bl.Map(step), u, repeated, 3, checkpointing=checkpointing)
        final.square().sum().backward()
        half = len(results[0]) // 2
        torch.testing.assert_close(leaf.grad, sum(results[0][:half]))


@every_checkpointing
@pytest.mark.parametrize("place", ["step", "terminal", "running"])
def test_a_sweep_inside_a_step_or_a_cost_is_refused(checkpointing, place):
    inner = bl.ControlProblem(bl.Map(lambda u, c, t: u * c), lambda u, c: u.sum(), 2)

    def nested(u, c):
        return bl.adjoint(inner, u, c).cost

    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u * c + (nested(u, c) if place == "step" else 0.0)),
        lambda u, c: (u * c).sum() + (nested(u, c) if place == "terminal" else 0.0),
        3,
        lambda u, c, t: (u * c).sum() + (nested(u, c) if place == "running" else 0.0),
    )
    with pytest.raises(LostGradientError, match=r"adjoint was called inside.*rollout or"):
        bl.adjoint(problem, real(1, 3), real(2, 3), checkpointing=checkpointing)


def test_a_sweep_inside_a_cost_is_welcome_where_nothing_is_lost():
    inner = bl.ControlProblem(bl.Map(lambda u, c, t: u * c), lambda u, c: u.sum(), 2)
    fixed = real(1, 3), real(2, 3)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u * c), lambda u, c: u.sum() * bl.adjoint(inner, *fixed).cost, 3
    )
    scale = float((fixed[0] * fixed[1] ** 2).sum())
    found = bl.adjoint(problem, real(1, 3), real(2, 3)).gradient
    torch.testing.assert_close(found, 3 * scale * real(1, 3) * real(2, 3) ** 2)
