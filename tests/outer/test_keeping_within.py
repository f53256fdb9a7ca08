"""A solve that was cut inside of an update goes on inside of it, bit by bit."""

import os

import pytest
import torch
from fuses import Fuse, PowerCutError
from problems import real, square

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, UnsupportedError

D = torch.float64
X, Y = real(1, 12, 3), real(2, 12)


fuse = Fuse()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here outlives the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def adam(leaves):
    return torch.optim.Adam(leaves, 0.1)


def lbfgs(leaves):
    return torch.optim.LBFGS(leaves, 0.1, max_iter=2)


def step(u, c, t):
    fuse()
    return torch.tanh(u @ c["A"] + c["b"]) + 0.01 * torch.randn_like(u)


def build(target):
    """Batches differ in what the costs close over, and in nothing that a sweep is given."""
    cost = lambda u, c: square(u - target) + 0.1 * square(c["A"])  # noqa: E731
    return bl.ControlProblem(bl.Map(step), cost, 4), torch.ones(3, dtype=D)


def controls(keep, resume, seed, **settings):
    torch.manual_seed(seed)
    control = {"A": torch.eye(3, dtype=D), "b": torch.zeros(3, dtype=D)}
    if settings.pop("batched"):
        settings |= {"batches": [real(t, 3) for t in range(3)], "accumulate": 2}
        solver = bl.ControlSolver(build, settings.pop("optimizer"))
    else:
        problem, start = build(real(1, 3))
        settings |= {"observation": start}
        solver = bl.ControlSolver(problem, settings.pop("optimizer"), bl.Checkpointing(2))
    found = solver.solve(control, steps=4, keep=keep, resume=resume, **settings)
    return found.control, found.costs, found.gradient_norms, found.adjoint and found.adjoint.cost


def inner(w, a, batch):
    fuse()
    x, y = batch
    noise = 0.01 * torch.randn(len(y), dtype=D)
    return square(x @ w - y + noise) / len(y) + (a.sigmoid() * w**2).sum()


def outer(w, a, batch):
    x, y = batch
    return square(x @ w - y + 0.01 * torch.randn(len(y), dtype=D)) / len(y)


def regressions(keep, resume, seed, **settings):
    torch.manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), 5, shuffle=True, drop_last=True
    )
    solver = bl.BilevelSolver(
        bl.BilevelProblem(inner, outer), bl.optim.Adam(0.05), 4, on_failure="ignore"
    )
    start = torch.zeros(3, dtype=D), torch.zeros(3, dtype=D)
    found = solver.solve(
        *start, steps=4, batches=(loader, loader), keep=keep, resume=resume, **settings
    )
    assert found.warm is not None
    return found.control, found.values, found.params, found.warm.state, found.warm.linear


CASES = {
    "controls": (controls, {"batched": False, "optimizer": adam}),
    "controls of batches": (controls, {"batched": True, "optimizer": adam}),
    "Newton": (controls, {"batched": False, "optimizer": bl.NewtonCG(bl.linear.CG(max_steps=2))}),
    "regressions": (regressions, {"optimizer": lbfgs}),
    "regressions, accumulated": (regressions, {"optimizer": adam, "accumulate": 2}),
}


USUAL = "controls", "regressions"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in CASES]
)
def test_cut_inside_of_updates(name, tmp_path):
    run, settings = CASES[name]
    fuse.set(0)
    run(bl.Keep(tmp_path / "first"), False, 0, **settings)
    fuse.set(0)
    whole = run(None, False, 0, **settings)
    n = fuse.made
    for at in range(3, n, n // 4 + 1):
        keep = bl.Keep(tmp_path / str(at), every=3, within=1)
        fuse.set(at)
        with pytest.raises(PowerCutError) as caught:
            run(keep, True, 0, **settings)
        assert hasattr(caught.value, "progress")
        fuse.set(0)
        found = run(keep, True, 77, **settings)
        assert all(
            x is y or torch.equal(torch.as_tensor(x), torch.as_tensor(y))
            for x, y in zip(tree.leaves_of(found), tree.leaves_of(whole), strict=True)
        ), at
        if name == "controls":
            assert fuse.made <= n - at + 8  # little was done again, though `every` is long


def test_a_checkpoint_ends_what_was_kept_inside(tmp_path):
    fuse.set(0)
    run, settings = CASES["controls of batches"]
    run(bl.Keep(tmp_path, every=2, within=2), False, 0, **settings)
    assert not (tmp_path / ".inside").exists()


def test_what_makes_no_sweep_of_its_own_is_refused(tmp_path):
    keep, zero = bl.Keep(tmp_path, within=5), torch.zeros(3, dtype=D)
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(UnsupportedError, match=r"Keep\(within=5\) keeps a sweep .* Implicit"):
        bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, bl.Implicit()).solve(zero, zero, keep=keep)
    given, start = build(real(1, 3))
    with pytest.raises(UnsupportedError, match="which Riccati"):
        bl.ControlSolver(given, bl.Riccati()).solve(
            {"A": torch.eye(3, dtype=D), "b": zero}, start, keep=keep
        )
    with pytest.raises(ArgumentError, match="within must be"):
        bl.Keep(tmp_path, within=0)
