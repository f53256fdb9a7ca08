"""A run that goes on from a checkpoint is, bit by bit, the one that was not interrupted."""

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fuses import PowerCutError
from problems import real, square
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, DivergenceError, StorageError, UnsupportedError

D = torch.float64
X, Y = real(1, 12, 3), real(2, 12)


def ending(step, how=PowerCutError):
    def callback(progress):
        if progress.step == step:
            if how is PowerCutError:
                raise PowerCutError
            signal.raise_signal(how)

    return callback


def regression(method=None, rule=None, certificate=None):
    """Weights with a learned decay; the outer objective draws at random."""

    def inner(w, a, batch):
        x, y = (X, Y) if batch is None else batch
        return square(x @ w["w"] - y) / len(y) + (a["d"].sigmoid() * w["w"] ** 2).sum()

    def outer(w, a, batch):
        x, y = (X, Y) if batch is None else batch
        return square(x @ w["w"] - y + 0.01 * torch.randn(len(y), dtype=D)) / len(y)

    problem = bl.BilevelProblem(inner, outer)
    rule = rule or bl.optim.Adam(0.05)
    solver = bl.BilevelSolver(
        problem, rule, 6, method or bl.Implicit(), certificate, on_failure="ignore"
    )
    return solver, ({"w": torch.zeros(3, dtype=D)}, {"d": torch.zeros(3, dtype=D)})


def same(a, b):
    """Whether two solutions agree in every bit."""
    trees = [(s.control, getattr(s, "params", None), getattr(s, "warm", None)) for s in (a, b)]
    trees = [(c, p, w and (w.state, w.linear)) for c, p, w in trees]
    pairs = zip(*map(tree.leaves_of, trees), strict=True)
    history = [getattr(s, "values", None) or s.costs for s in (a, b)]
    return (
        all(x is y is None or torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)
        and history[0] == history[1]
        and a.gradient_norms == b.gradient_norms
        and (a.reason, a.steps, a.converged) == (b.reason, b.steps, b.converged)
    )


def cut_and_resumed(solver, given, folder, *, at=5, how=PowerCutError, batches=dict, **settings):
    """The run without a cut, and the one that was cut after an update and went on."""
    torch.manual_seed(0)
    whole = solver.solve(*given, **batches(), **settings)
    keep = bl.Keep(folder, every=2)
    torch.manual_seed(0)
    with pytest.raises((PowerCutError, KeyboardInterrupt, SystemExit)) as caught:
        solver.solve(*given, **batches(), **settings, keep=keep, callback=ending(at, how))
    assert caught.value.progress.steps == at
    torch.manual_seed(77)
    return whole, solver.solve(*given, **batches(), **settings, keep=keep, resume=True)


def adam(leaves):
    return torch.optim.Adam(leaves, 0.05)


OPTIMIZERS = {
    "adam": adam,
    "momentum": lambda leaves: torch.optim.SGD(leaves, 0.05, momentum=0.5),
    "lbfgs": lambda leaves: torch.optim.LBFGS(leaves, max_iter=2),
}


@pytest.mark.parametrize(
    ("method", "rule", "optimizer"),
    [
        (bl.Implicit(), bl.optim.Adam(0.05), "adam"),
        (bl.MLM(), bl.optim.SGD(0.05, momentum=0.9), "lbfgs"),
        (bl.Unrolled(), bl.optim.SGD(0.05), "momentum"),
        (bl.OneStep(), bl.optim.ProximalGradient(0.05, bl.prox.L1(0.01)), "adam"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_bilevel_run_goes_on_bit_by_bit(tmp_path, method, rule, optimizer):
    certificate = bl.AgainstMinimiser() if isinstance(method, bl.Implicit) else None
    solver, given = regression(method, rule, certificate)
    whole, found = cut_and_resumed(
        solver,
        given,
        tmp_path,
        optimizer=OPTIMIZERS[optimizer],
        steps=8,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    )
    assert same(found, whole)
    assert list(map(str, found.certificates)) == list(map(str, whole.certificates))


def seeded_stream():
    generator = torch.Generator().manual_seed(4)
    while True:
        rows = torch.randint(12, (4,), generator=generator)
        yield (X[rows], Y[rows]), (X, Y)


class Resumable:
    """Batches that say by themselves where they are."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while True:
            self.at += 1
            rows = [(self.at + k) % 12 for k in range(4)]
            yield (X[rows], Y[rows]), (X, Y)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def shuffled():
    data = TensorDataset(X, Y)
    own = torch.Generator().manual_seed(5)
    return DataLoader(data, 5, shuffle=True), DataLoader(data, 7, shuffle=True, generator=own)


BATCHES = {
    "list": lambda: [((X[:5], Y[:5]), (X[5:], Y[5:])), ((X[5:], Y[5:]), None), (None, None)],
    "shuffled loaders": shuffled,
    "minibatches": lambda: (bl.Minibatches((X, Y), 5), bl.Minibatches((X, Y), 4)),
    "generator": seeded_stream,
    "with a state": Resumable,
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_go_on_where_they_were(tmp_path, name):
    solver, given = regression()
    whole, found = cut_and_resumed(
        solver, given, tmp_path, batches=lambda: {"batches": BATCHES[name]()}, steps=9
    )
    assert same(found, whole)


def tracking(random_steps=True):
    """Complex, 0-d and integer leaves; steps that draw."""

    def step(u, c, t):
        noise = 0.01 * torch.randn_like(u) if random_steps else 0
        return torch.tanh(u @ c["A"] + c["b"]) + noise

    def build(batch):
        return bl.ControlProblem(
            bl.Map(step),
            lambda u, c: square(u - batch) + square(c["A"]) / 10 + c["z"].abs() ** 2,
            4,
        ), torch.ones(3, dtype=D)

    control = {
        "A": torch.eye(3, dtype=D),
        "b": torch.zeros(3, dtype=D),
        "z": torch.tensor(1 + 2j, dtype=torch.complex128),
        "n": torch.tensor(3),
    }
    return build, control


DATA = [torch.full((3,), i / 5, dtype=D) for i in range(5)]


@pytest.mark.parametrize("how", [PowerCutError, signal.SIGINT, signal.SIGTERM])
def test_a_control_run_goes_on_after_errors_and_signals(tmp_path, how):
    build, control = tracking()
    whole, found = cut_and_resumed(
        bl.ControlSolver(build),
        (control,),
        tmp_path,
        how=how,
        batches=lambda: {"batches": DATA},
        steps=9,
        accumulate=2,
    )
    assert same(found, whole)
    # A signal is kept where it came; an error keeps what was there before.
    kept = sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("update-*"))
    assert kept == [6, 8, 9]


@pytest.mark.parametrize("batched", [True, False])
def test_newton_goes_on_with_the_draws_of_its_run(tmp_path, batched):
    build, control = tracking()
    newton = bl.NewtonCG(bl.linear.CG(max_steps=3))
    if batched:
        solver, given = bl.ControlSolver(build, newton), (control,)
        batches = lambda: {"batches": DATA}  # noqa: E731
    else:
        problem, start = build(DATA[1])
        solver, given, batches = bl.ControlSolver(problem, newton), (control, start), dict
    whole, found = cut_and_resumed(solver, given, tmp_path, at=3, batches=batches, steps=5)
    assert same(found, whole)
    assert found.cost == whole.cost or not batched


def test_a_part_that_was_read_before_the_cut_counts_as_read(tmp_path):
    def build(batch):
        dynamics = bl.Map(lambda u, c, t: u + c["a"] + (c["b"] if batch else 0))
        return bl.ControlProblem(dynamics, lambda u, c: square(u - 3), 1), torch.zeros(1, dtype=D)

    control = {"a": torch.zeros(1, dtype=D), "b": torch.zeros(1, dtype=D)}
    whole, found = cut_and_resumed(
        bl.ControlSolver(build),
        (control,),
        tmp_path,
        at=2,
        batches=lambda: {"batches": [1, 0, 0, 0, 0, 0, 0]},
        steps=4,
    )
    assert same(found, whole)


def test_generators_of_the_users_own_go_on_too(tmp_path):
    def made():
        ours, theirs = torch.Generator().manual_seed(1), np.random.default_rng(2)

        def cost(u, c):
            scale = 1 + torch.rand((), generator=ours, dtype=D) + theirs.random()
            return scale * square(u - 1) + float(np.random.rand())  # noqa: NPY002

        problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), cost, 1)
        return bl.ControlSolver(lambda batch: (problem, torch.zeros(2, dtype=D)))

    given = (torch.zeros(2, dtype=D),)
    np.random.seed(0)  # noqa: NPY002
    whole = made().solve(*given, batches=[0], steps=6)
    keep = bl.Keep(tmp_path, every=2)
    np.random.seed(0)  # noqa: NPY002
    with pytest.raises(PowerCutError):
        made().solve(*given, batches=[0], steps=6, keep=keep, callback=ending(5))
    found = made().solve(*given, batches=[0], steps=6, keep=keep, resume=True)
    assert same(found, whole)


def test_what_a_callback_gathers_is_kept_beside_the_run(tmp_path):
    class Gathering:
        def __init__(self):
            self.seen = []

        def __call__(self, progress):
            self.seen.append((progress.step, progress.control.clone()))
            if progress.step == 3 and not tmp_path.joinpath("again").exists():
                raise PowerCutError

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    solver = bl.ControlSolver(bl.ControlProblem(bl.Map(lambda u, c, t: u + c), square_cost, 1))
    first, given = Gathering(), (torch.zeros(2, dtype=D), torch.ones(2, dtype=D))
    folder = tmp_path / "run"
    with pytest.raises(PowerCutError):
        solver.solve(*given, steps=4, callback=first, keep=bl.Keep(folder, every=2, also=first))
    (tmp_path / "again").touch()
    second = Gathering()
    keep = bl.Keep(folder, every=2, also=second)
    solver.solve(*given, steps=4, callback=second, keep=keep, resume=True)
    assert [step for step, _ in second.seen] == [1, 2, 3, 4]
    assert torch.equal(second.seen[1][1], first.seen[1][1])


def square_cost(u, c):
    return square(u) / 2


def pushed(rate=0.1, **settings):
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), square_cost, 1)
    solver = bl.ControlSolver(problem, lambda leaves: torch.optim.SGD(leaves, rate))
    return solver.solve(torch.zeros(2, dtype=D), torch.ones(2, dtype=D), **settings)


# What a folder is, and is not.


def test_a_run_begins_where_the_folder_is_empty_and_goes_on_for_longer(tmp_path):
    keep = bl.Keep(tmp_path / "new" / "folder", every=2, last=2)
    assert same(pushed(steps=5, keep=keep, resume=True), pushed(steps=5))
    assert same(pushed(steps=9, keep=keep, resume=True), pushed(steps=9))
    there = sorted(p.name for p in Path(keep.folder).iterdir() if not p.name.startswith("."))
    assert [name.split("-")[1] for name in there] == ["000000008", "000000009"]
    assert same(pushed(steps=9, keep=keep, resume=8), pushed(steps=9))
    with pytest.raises(ArgumentError, match="kept after 9 updates, steps is 7: ask for at least"):
        pushed(steps=7, keep=keep, resume=True)
    with pytest.raises(ArgumentError, match="holds no checkpoint after update 3, those there are"):
        pushed(steps=9, keep=keep, resume=3)
    with pytest.raises(ArgumentError, match="earlier run, the newest after update 9: pass resume="):
        pushed(steps=9, keep=keep)


def test_a_run_that_its_callback_ended_is_over(tmp_path):
    keep = bl.Keep(tmp_path, every=2)
    first = pushed(steps=9, keep=keep, callback=lambda p: p.step == 3)
    assert first.steps == 3
    assert same(pushed(steps=9, keep=keep, resume=True), first)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(tmp_path):
    keep = bl.Keep(tmp_path, every=2)
    whole = pushed(steps=6, keep=keep)
    newest = max(tmp_path.glob("update-*"))
    content = newest.read_bytes()
    middle = len(content) // 2
    altered = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    for damaged in (content[:middle], b"", altered, content + b" ", b"\xff" * 90):
        newest.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"truncated or altered.*pass resume=4 to") as caught:
            pushed(steps=6, keep=keep, resume=True)
        assert str(newest) in str(caught.value)
    assert same(pushed(steps=6, keep=keep, resume=4), whole)
    for path in tmp_path.glob("update-*"):
        path.write_bytes(b"nothing")
    with pytest.raises(StorageError, match="no whole one before it: start anew in another folder"):
        pushed(steps=6, keep=keep, resume=True)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(ArgumentError, match=r"no folder of checkpoints: it holds 'notes.txt'"):
            pushed(steps=2, keep=bl.Keep(tmp_path), resume=resume)
    with pytest.raises(StorageError, match="cannot be made or written"):
        pushed(steps=2, keep=bl.Keep(tmp_path / "notes.txt"))
    with pytest.raises(ArgumentError, match="got no keep: pass keep=Keep"):
        pushed(steps=2, resume=True)
    with pytest.raises(ArgumentError, match="resume must be True, False or a number"):
        pushed(steps=2, keep=bl.Keep(tmp_path / "new"), resume="last")


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    keep = bl.Keep(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("bilevel.outer.checkpoints.FORMAT", 2)
        pushed(steps=2, keep=keep)
    with pytest.raises(StorageError, match=r"newer version, format 2, .* up to 1: update bilevel"):
        pushed(steps=3, keep=keep, resume=True)


def test_other_settings_and_problems_are_listed(tmp_path):
    keep = bl.Keep(tmp_path, conditions={"data": ["a.h5", 3]})
    pushed(steps=2, keep=keep)
    with pytest.raises(ArgumentError, match=r"optimizer.groups\[0\].lr was 0.1, is 0.2. Restore"):
        pushed(0.2, steps=3, keep=keep, resume=True)
    other = bl.Keep(tmp_path, conditions={"data": ["b.h5", 3]})
    with pytest.raises(ArgumentError, match=r"data was \['a.h5', 3\], is \['b.h5', 3\]"):
        pushed(steps=3, keep=other, resume=True)
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + 2 * c), square_cost, 3)
    solver = bl.ControlSolver(problem, lambda leaves: torch.optim.SGD(leaves, 0.1))
    with pytest.raises(ArgumentError, match="horizon was 1, is 3") as caught:
        solver.solve(torch.zeros(2), torch.ones(2, dtype=D), steps=3, keep=keep, resume=True)
    assert "control was float64[2] on cpu, is float32[2] on cpu" in str(caught.value)
    assert "dynamics.g was " in str(caught.value)
    bilevel, given = regression()
    folder = bl.Keep(tmp_path / "bilevel")
    bilevel.solve(*given, steps=1, keep=folder)
    changed, _ = regression(bl.MLM(), bl.optim.SGD(0.05))
    with pytest.raises(ArgumentError, match=r"solver\.method was Implicit, is MLM"):
        changed.solve(*given, steps=2, keep=folder, resume=True)
    with pytest.raises(ArgumentError, match="warm_start was True, is False"):
        bilevel.solve(*given, steps=2, keep=folder, resume=True, warm_start=False)


def test_data_in_another_order_are_refused(tmp_path):
    build, control = tracking()
    solver, keep = bl.ControlSolver(build), bl.Keep(tmp_path, every=2)
    solver.solve(control, batches=DATA, steps=2, keep=keep)
    with pytest.raises(ArgumentError, match="batches cannot be begun again at batch 2 of their"):
        solver.solve(control, batches=DATA[::-1], steps=3, keep=keep, resume=True)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    seen = []

    def callback(progress):
        with pytest.raises(StorageError, match="another run keeps its checkpoints there; wait"):
            pushed(steps=2, keep=bl.Keep(tmp_path))
        seen.append(progress.step)

    pushed(steps=2, keep=bl.Keep(tmp_path), callback=callback)
    assert seen == [1, 2]


def test_stale_temporaries_are_cleaned_and_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    keep = bl.Keep(tmp_path, every=2)
    pushed(steps=2, keep=keep)
    (tmp_path / ".writing-abc").write_bytes(b"half")
    before = {p.name for p in tmp_path.glob("update-*")}

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device.*before it are") as caught:
            pushed(steps=9, keep=keep, resume=True)
    assert caught.value.progress.steps == 4
    assert {p.name for p in tmp_path.iterdir()} == before | {".lock"}
    assert same(pushed(steps=9, keep=keep, resume=True), pushed(steps=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"last": 0}, "last must be a whole number >= 1"),
        ({"folder": 3}, "folder must be the path of a folder, got int"),
        ({"also": object()}, "also must be an object with state_dict and load_state_dict"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        bl.Keep(**{"folder": "x", **settings})


def test_what_cannot_be_kept_is_named(tmp_path):
    class Odd:
        def state_dict(self):
            return {"model": torch.nn.Linear(1, 1)}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(UnsupportedError, match=r"also.model holds a Linear, and what is kept must"):
        pushed(steps=2, keep=bl.Keep(tmp_path, also=Odd()))


# Guards.


def falling(rate, **settings):
    """u^4: the step explodes where the rate is large."""
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: (u**4).sum() / 4, 1)
    solver = bl.ControlSolver(problem, lambda leaves: torch.optim.SGD(leaves, rate))
    return solver.solve(torch.zeros(1, dtype=D), torch.full((1,), 2.0, dtype=D), **settings)


def test_a_divergence_goes_back_with_a_smaller_step(tmp_path, caplog):
    with pytest.raises(DivergenceError):
        falling(0.6, steps=60)
    for kept in ({}, {"keep": bl.Keep(tmp_path, every=3)}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bilevel"):
            found = falling(0.6, steps=60, on_divergence=bl.Restore(factor=0.25), **kept)
        assert found.steps == len(found.costs) == 60
        assert found.cost < 1
        assert "It went back" in found.reason
        assert "Back to update" in caplog.text
    assert all(map(np.isfinite, found.costs))
    with pytest.raises(DivergenceError) as caught:
        falling(1e9, steps=60, on_divergence=bl.Restore(times=2))
    assert any("went back 2 times" in note for note in caught.value.__notes__)
    with pytest.raises(ArgumentError, match=r"'raise', 'restore' or a Restore\(...\), got 'retry'"):
        falling(0.1, steps=1, on_divergence="retry")
    with pytest.raises(ArgumentError, match="factor must be > 0 and < 1"):
        bl.Restore(factor=1.0)


def test_restoring_and_resuming_agree(tmp_path):
    settings = {"steps": 12, "on_divergence": "restore"}
    whole = falling(0.6, **settings, keep=bl.Keep(tmp_path / "whole", every=3))
    keep = bl.Keep(tmp_path / "cut", every=3)
    with pytest.raises(PowerCutError):
        falling(0.6, **settings, keep=keep, callback=ending(7))
    assert [*(tmp_path / "cut").glob("update-*")]
    assert same(falling(0.6, **settings, keep=keep, resume=True), whole)


def test_moments_that_overflow_are_not_kept(tmp_path):
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: 1e25 * u.sum(), 1)
    solver = bl.ControlSolver(problem, adam)
    with pytest.raises(DivergenceError, match=r"optimizer.state.0.exp_avg_sq is not finite"):
        solver.solve(torch.zeros(2), torch.ones(2), steps=2, keep=bl.Keep(tmp_path))
    assert not [*tmp_path.glob("update-*")]


# A warm start from an earlier solve.


def test_a_solve_goes_on_from_the_inner_state_of_another():
    solver, given = regression()
    torch.manual_seed(0)
    first = solver.solve(*given, steps=3, batches=[(None, None)])
    warm = solver.solve(*given, steps=1, batches=[(None, None)], warm=first.warm)
    assert warm.warm.steps == first.warm.steps + 6
    with pytest.raises(ArgumentError, match="leave one of the two out"):
        solver.solve(*given, steps=1, warm=first.warm, warm_start=False)
    with pytest.raises(ArgumentError, match="warm must be a Warm"):
        solver.solve(*given, steps=1, warm=first)


# Killed for good.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_killed_leaves_a_run_that_goes_on(tmp_path, number):
    solver, given = regression(certificate=bl.AgainstMinimiser())

    def run(callback=None, keep=None):
        torch.manual_seed(0)
        batches = {"batches": shuffled(), "steps": 12, "callback": callback}
        return solver.solve(*given, **batches, keep=keep, resume=keep is not None)

    keep = bl.Keep(tmp_path, every=2)
    for step in (3, 6, 11):  # killed again and again
        child = os.fork()
        if not child:
            with suppress(BaseException):
                run(lambda p: p.step == step and os.kill(os.getpid(), number), keep)  # noqa: B023
            os._exit(0)
        os.waitpid(child, 0)
    newest = max(tmp_path.glob("update-*")).name
    assert newest.startswith("update-0000000" + ("10" if number == signal.SIGKILL else "11"))
    assert same(run(keep=keep), run())
