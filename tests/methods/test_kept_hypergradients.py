"""A hypergradient whose sweep was cut, and went on, is the one that nobody cut, bit by bit."""

import math
import os

import pytest
import torch
from fuses import Fuse, PowerCutError
from problems import real, square

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError

D = torch.float64
X, Y = real(1, 12, 3), real(2, 12)
W, A = torch.zeros(3, dtype=D), {"d": torch.zeros(3, dtype=D), "s": torch.zeros((), dtype=D)}


fuse = Fuse()


def inner(w, a, batch):
    fuse()
    x, y = batch
    noise = 0.1 * torch.randn(len(y), dtype=D)
    return square(x @ w - y + noise) / len(y) + (a["d"].sigmoid() * w**2).sum() * a["s"].exp()


def outer(w, a, batch):
    fuse()
    x, y = (X, Y) if batch is None else batch
    return square(x @ w - y + 0.01 * torch.randn(len(y), dtype=D)) / len(y)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here outlives the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


CASES = {
    "minibatches, Adam, a certificate": (
        {"optimizer": bl.optim.Adam(0.05), "certificate": bl.AgainstMinimiser()},
        bl.Minibatches((X, Y), 4, seed=0),
    ),
    "one snapshot, AgainstSteps": (
        {
            "optimizer": bl.optim.SGD(0.05, 0.9),
            "method": bl.MLM(bl.Checkpointing(snapshots=1, block=2)),
            "certificate": bl.AgainstSteps(),
        },
        (X, Y),
    ),
    "the last steps": (
        {"optimizer": bl.optim.SGD(0.05), "method": bl.MLM(last=4), "certificate": None},
        (X, Y),
    ),
    "stopped by bounds": (
        {
            "optimizer": bl.optim.SGD(0.05),
            "method": bl.MLM(tolerance=0.5, bounds=bl.methods.mlm.Bounds(0.5, 0.1)),
            "certificate": None,
        },
        (X, Y),
    ),
    "micro-batches": (
        {"optimizer": bl.optim.AdamW(0.05), "certificate": None, "micro_batches": 3},
        (X, Y),
    ),
}


def found(name, keep=None, resume=False):
    settings, batch = CASES[name]
    problem = bl.BilevelProblem(inner, outer)
    solver = bl.BilevelSolver(problem, inner_steps=7, on_failure="ignore", **settings)
    torch.manual_seed(0)
    h = solver.hypergradient(W, A, batch, (X, Y), keep=keep, resume=resume)
    certified = h.certificate and (h.certificate.error_estimate, h.certificate.products)
    truncated = h.truncation and (h.truncation.steps, h.truncation.error)
    tensors = tree.leaves_of([h.value, h.gradient, h.params, h.warm.state]), torch.rand(2)
    return tensors, (certified, truncated)


@pytest.mark.parametrize("name", CASES)
def test_cut_anywhere(name, tmp_path):
    found(name)  # which compares the gradients of two evaluations, once
    fuse.set(0)
    whole, said = found(name)
    n = fuse.made
    for at in range(2, n, max(n // 6, 2)):
        keep = bl.Keep(tmp_path / str(at), every=1)
        fuse.set(at)
        with pytest.raises(PowerCutError):
            found(name, keep)
        fuse.set(0)
        again, told = found(name, keep, resume=True)
        assert all(map(torch.equal, tree.leaves_of(again), tree.leaves_of(whole))), at
        assert told == said or all(math.isnan(x) for x, _ in (told[0], said[0])), at


def test_what_is_kept_beside_goes_along(tmp_path):
    class Counter:
        n = 0

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    name = "micro-batches"
    counter = Counter()
    keep = bl.Keep(tmp_path, every=1, also=counter)
    counter.n = 7
    fuse.set(20)
    with pytest.raises(PowerCutError):
        found(name, keep)
    counter.n, fuse.at = 0, 0
    found(name, keep, resume=True)
    assert counter.n == 7


def test_other_batches_and_methods_are_refused(tmp_path):
    problem, keep = bl.BilevelProblem(inner, outer), bl.Keep(tmp_path, every=1)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, certificate=None)
    fuse.set(9)
    with pytest.raises(PowerCutError):
        solver.hypergradient(W, A, (X, Y), (X, Y), keep=keep)
    fuse.set(0)
    with pytest.raises(ArgumentError, match=r"batches.outer_batch\[1\] was float64\[12\]"):
        solver.hypergradient(W, A, (X, Y), (X, Y + 1), keep=keep, resume=True)
    with pytest.raises(ArgumentError, match="horizon was 5, is 6"):
        longer = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 6, certificate=None)
        longer.hypergradient(W, A, (X, Y), (X, Y), keep=keep, resume=True)
    with pytest.raises(ArgumentError, match="take method=MLM"):
        bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, bl.Implicit()).hypergradient(
            W, A, (X, Y), (X, Y), keep=keep
        )
    with pytest.raises(ArgumentError, match="keep must be a Keep"):
        solver.hypergradient(W, A, (X, Y), (X, Y), resume=True)
