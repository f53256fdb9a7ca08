"""Sweeps in blocks of steps find what sweeps step by step do."""

import pytest
import torch
from problems import real, zeros

import bilevel as bl
from bilevel.control.riccati import blocks
from bilevel.control.riccati.blocks import affine, block_of
from bilevel.control.riccati.sweep import Model, backward

F64 = torch.float64
N, M = 3, 2


def model(horizon, b, bad=None):
    maps = torch.zeros(b, horizon, N + 1, N + 1 + M, dtype=F64)
    maps[:, :, :N, :N] = 0.6 * real(1, b, horizon, N, N)
    maps[:, :, :N, N + 1 :] = real(2, b, horizon, N, M)
    maps[:, :, N, N] = 1
    root = real(3, b, horizon, N + 1 + M, N + 1 + M)
    steps = root @ root.mT + torch.eye(N + 1 + M, dtype=F64)
    if bad is not None:
        steps[-1, bad - 1, N + 1 :, N + 1 :] -= 1e4 * torch.eye(M, dtype=F64)
    nothing = torch.zeros(b, N, 0, dtype=F64), torch.zeros(b, 0, 0, dtype=F64)
    return Model(maps, steps, torch.eye(N + 1, dtype=F64).repeat(b, 1, 1), *nothing)


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("horizon", [20, 23, 60, 101])
def test_a_sweep_in_blocks_is_that_of_every_step(horizon, shift, monkeypatch):
    one, shifts = model(horizon, 2), torch.tensor([shift, 2 * shift], dtype=F64)
    assert block_of(horizon, 2 * (N + 1 + M) ** 2) > 1
    found = backward(one, shifts)
    monkeypatch.setattr(blocks, "SMALL", 0)
    wanted = backward(one, shifts)
    for name in ("values", "gains", "factors", "slope"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-11, atol=1e-11
        )
    assert found.failed.tolist() == wanted.failed.tolist() == [-1, -1]


@pytest.mark.parametrize("bad", [1, 7, 22, 23])
def test_the_step_that_is_not_convex_is_named(bad, monkeypatch):
    one, none = model(23, 2, bad), torch.zeros(2, dtype=F64)
    found = backward(one, none).failed
    monkeypatch.setattr(blocks, "SMALL", 0)
    assert found.tolist() == backward(one, none).failed.tolist() == [-1, bad]


@pytest.mark.parametrize("horizon", [0, 1, 19, 20, 31, 64])
def test_an_affine_recursion_in_blocks_is_that_of_every_step(horizon):
    A, r, x = 0.5 * real(1, 2, horizon, N, N), real(2, 2, horizon, N), real(3, 2, N)
    wanted = [x]
    for t in range(horizon - 1, -1, -1):
        wanted.append((A[:, t] @ wanted[-1].unsqueeze(2)).squeeze(2) + r[:, t])
    torch.testing.assert_close(affine(A, r, x), torch.stack(wanted[::-1], 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bend", [0.0, 1.0], ids=["linear", "bent"])
def test_states_that_are_foreseen_are_those_of_the_dynamics(bend):
    T, A, B = 37, 0.5 * real(1, N, N), real(2, N)
    step = bl.Map(lambda x, u, t: A @ x + B * u + bend * x * x.roll(1))
    problem = bl.ControlProblem(step, lambda x, c: x @ x, T, lambda x, u, t: x @ x + u * u)
    start = 0.3 * real(3, N)
    calls = []
    counted = bl.ControlProblem(
        bl.Map(lambda x, u, t: (calls.append(t), problem.dynamics.step(x, u, t))[1]),
        problem.terminal,
        T,
        problem.running,
    )
    found = bl.ControlSolver(counted, bl.Riccati()).solve(zeros(T), start)
    assert found.converged
    # Steps are called all at once, but for the roll-outs: the first, and those of a bent dynamics.
    assert len(calls) <= T * (1 + bend * len(found.costs)) + 3 * (2 + len(found.costs))
    assert found.steps == 1 or bend
    states = bl.rollout(problem.dynamics, start, found.control, T)
    torch.testing.assert_close(found.adjoint.final_state, states, rtol=1e-12, atol=1e-14)
