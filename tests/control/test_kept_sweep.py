"""A sweep that was cut anywhere and goes on is, bit by bit, the one that nobody cut."""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import cplx, real, square
from torch import nn

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, DivergenceError, StorageError

D = torch.float64
T = 5
FOLDER = tempfile.gettempdir()


class PowerCutError(Exception):
    """Ends a sweep at once."""


class Fuse:
    """Counts evaluations, and ends the run at one of them."""

    def __init__(self):
        self.made, self.at, self.how = 0, 0, None

    def set(self, at, how=None):
        self.made, self.at, self.how = 0, at, how

    def __call__(self):
        self.made += 1
        if self.made == self.at:
            if self.how is None:
                raise PowerCutError
            os.kill(os.getpid(), self.how)


fuse = Fuse()


@dataclass(frozen=True)
class Swept(bl.Dynamics):
    """A step and a beginning that the fuse may end."""

    move: Callable[..., Any]
    begin: Callable[..., Any] = lambda f, c: f  # noqa: ARG005, E731

    def init(self, observation, control):
        fuse()
        return self.begin(observation, control)

    def step(self, state, control, t):
        fuse()
        return self.move(state, control, t)


def problem(move, terminal=None, running=None, begin=None):
    def end(u, c):
        fuse()
        return (terminal or (lambda u, c: square(u)))(u, c)  # noqa: ARG005

    dynamics = Swept(move) if begin is None else Swept(move, begin)
    return bl.ControlProblem(dynamics, end, T, running)


def dropout(u, c, t):
    return torch.tanh(nn.functional.dropout(u, 0.5) * c["a"] + t * c["b"])


def adam(u, c, t):
    """A state of several parts, two of them one tensor at first, one an integer."""
    slope = c["a"] * u["w"] - c["b"] + 0.1 * torch.randn(4, dtype=D)
    m, v = 0.9 * u["m"] + 0.1 * slope, 0.9 * u["v"] + 0.1 * slope**2
    return {"w": u["w"] - 0.1 * m / (v + 0.1).sqrt(), "m": m, "v": v, "n": u["n"] + 1}


def started(f, c):
    zero = torch.zeros(4, dtype=D)
    return {"w": f * c["a"], "m": zero, "v": zero, "n": torch.tensor(0)}


def noisy(u, c, t):  # noqa: ARG001
    return (torch.rand((), dtype=D) * u**2 * c["a"]).sum()


C = {"a": 0.5 * real(1, 4), "b": real(2, 4)}
STEPS = bl.PerStep([0.5 * real(t, 4) for t in range(T)], initial=real(7, 4), shared=real(8, 4))
CASES = {
    "plain": (problem(lambda u, c, t: torch.tanh(c["a"] * u + c["b"])), real(3, 4), C),
    "drawn": (
        problem(dropout, lambda u, c: noisy(u, c, 0) + square(u), noisy),
        *(real(3, 4), C),
    ),
    "complex": (
        problem(
            lambda u, c, t: torch.sin(u * c["a"]) + 0.1j * torch.randn(4, dtype=D) * u.conj(),
            lambda u, c: (u.abs() ** 2).sum(),
        ),
        *(cplx(3, 4), {"a": cplx(4, 4)}),
    ),
    "per step": (
        problem(
            lambda u, c, t: torch.tanh(c[0] * u + c[1] + 0.1 * torch.randn(4, dtype=D)),
            running=lambda u, c, t: (u * c[0]).sum(),
            begin=lambda f, c: f * c,
        ),
        *(real(3, 4), STEPS),
    ),
    "state of parts": (
        problem(adam, lambda u, c: noisy(u["w"], c, 0), begin=started),
        *(real(3, 4), C),
    ),
}
PLANS = {
    "states": None,
    "one snapshot": bl.Checkpointing(snapshots=1),
    "blocks": bl.Checkpointing(snapshots=2, block=2),
    "disk": bl.Checkpointing(snapshots=2, storage=bl.OnDisk(FOLDER)),
    "budget": bl.Budget("30 KiB"),
}


def swept(case, plan, keep=None, resume=False, **settings):
    torch.manual_seed(3)
    found = bl.adjoint(
        *CASES[case], checkpointing=PLANS[plan], keep=keep, resume=resume, **settings
    )
    return found, torch.rand(3)  # which the generator gives afterwards


def same(a, b):
    (one, after), (other, later) = a, b
    fields = "cost", "gradient", "observation_gradient", "final_state", "states", "multipliers"
    leaves = [tree.leaves_of([getattr(x, n) for n in fields]) for x in (one, other)]
    equal = all(x is y or torch.equal(x, y) for x, y in zip(*leaves, strict=True))
    return equal and one.forward_steps == other.forward_steps and torch.equal(after, later)


def evaluations(case, plan, folder, every, **settings):
    """Of a whole sweep; the comparison of gradients, made once for each step, is over before."""
    fuse.set(0)
    swept(case, "states")
    plain = swept(case, plan, **settings)
    fuse.set(0)
    whole = swept(case, plan, bl.Keep(folder, every=every), **settings)
    if not isinstance(
        PLANS[plan], bl.Budget
    ):  # which is planned in shorter blocks where it is kept
        assert same(plain, whole)
    return whole, fuse.made


@pytest.fixture
def quick_disk(monkeypatch):
    """Nothing here outlives the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


USUAL = [("drawn", "states"), ("state of parts", "one snapshot"), ("per step", "blocks")]
USUAL += [("complex", "disk"), ("plain", "budget")]


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(
    ("case", "plan"),
    [
        pytest.param(case, plan, marks=[] if (case, plan) in USUAL else pytest.mark.slow)
        for case in CASES
        for plan in PLANS
    ],
)
def test_cut_at_every_evaluation_forward_and_back(case, plan, tmp_path):
    wholes = [evaluations(case, plan, tmp_path / f"every-{k}", k) for k in (1, 2)]
    sparse = 4 if plan == "budget" else 1  # most of whose evaluations measure a step
    for at in range(1, wholes[0][1] + 1, sparse):
        keep = bl.Keep(tmp_path / str(at), every=1 + at % 2)
        whole, n = wholes[at % 2]
        if at > n:
            continue
        fuse.set(at)
        with pytest.raises(PowerCutError):
            swept(case, plan, keep, resume=True)
        fuse.set(0)
        assert same(swept(case, plan, keep, resume=True), whole), at
        if not isinstance(PLANS[plan], bl.Budget):  # which is measured first
            assert fuse.made <= n - at + 6  # little was done again
        assert [*(tmp_path / str(at)).glob(".writing*")] == []


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("plan", ["one snapshot", "blocks"])
def test_cut_again_and_again(plan, tmp_path):
    settings = {"keep_states": True, "keep_multipliers": True}
    whole, n = evaluations("state of parts", plan, tmp_path / "whole", 1, **settings)
    for cut in range(3 * n):
        fuse.set(6)
        try:
            found = swept(
                "state of parts", plan, bl.Keep(tmp_path / "cut", every=1), True, **settings
            )
        except PowerCutError:
            continue
        assert cut > n // 6
        break
    fuse.set(0)
    assert same(found, whole)
    assert same(
        swept("state of parts", plan, bl.Keep(tmp_path / "cut", every=1), True, **settings), whole
    )
    assert fuse.made <= 3  # a sweep that is over is not made again
