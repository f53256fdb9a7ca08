"""A sweep that was cut anywhere and goes on is, bit by bit, the one that nobody cut."""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fuses import PowerCutError
from problems import cplx, real, square
from torch import nn

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, DivergenceError, StorageError

D = torch.float64
T = 5
U = real(3, 4)
FOLDER = tempfile.gettempdir()


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
    begin: Callable[..., Any] = lambda f, c: f

    def init(self, observation, control):
        fuse()
        return self.begin(observation, control)

    def step(self, state, control, t):
        fuse()
        return self.move(state, control, t)


def problem(move, terminal=None, running=None, begin=None):
    def end(u, c):
        fuse()
        return (terminal or (lambda u, c: square(u)))(u, c)

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


def noisy(u, c, t):
    return (torch.rand((), dtype=D) * u**2 * c["a"]).sum()


C = {"a": 0.5 * real(1, 4), "b": real(2, 4)}
STEPS = bl.PerStep([0.5 * real(t, 4) for t in range(T)], initial=real(7, 4), shared=real(8, 4))
CASES = {
    "expanded": (
        problem(lambda u, c, t: (u * c).mean(0) + 0.1 * u, begin=lambda f, c: f.expand(5, 4)),
        *(real(3, 4), real(4, 5, 4)),
    ),
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
    keep, found = bl.Keep(tmp_path / "cut", every=1), None
    for cut in range(3 * n):
        fuse.set(6)
        try:
            found = swept("state of parts", plan, keep, True, **settings)
        except PowerCutError:
            continue
        assert cut > n // 6
        break
    fuse.set(0)
    assert same(found, whole)
    assert same(swept("state of parts", plan, keep, True, **settings), whole)
    assert fuse.made <= 3  # a sweep that is over is not made again


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("at", [2, 7, 11, 14])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_keep_before_they_end_a_sweep(how, at, tmp_path):
    whole, n = evaluations("drawn", "one snapshot", tmp_path / "whole", 99)
    keep = bl.Keep(tmp_path / "cut", every=99)
    fuse.set(at, how)
    with pytest.raises(SystemExit if how == signal.SIGTERM else KeyboardInterrupt):
        swept("drawn", "one snapshot", keep)
    assert fuse.made <= at + 3  # a block is waited for, and the end
    fuse.set(0)
    assert same(swept("drawn", "one snapshot", keep, resume=True), whole)
    assert fuse.made <= n - at + 2


def test_a_cut_sweep_lists_what_differs_when_it_goes_on(tmp_path):
    fuse.set(9)
    keep = bl.Keep(tmp_path, every=1)
    with pytest.raises(PowerCutError):
        swept("drawn", "states", keep)
    fuse.set(0)
    given, f, c = CASES["drawn"]
    longer = bl.ControlProblem(given.dynamics, given.terminal, T + 1, given.running)
    for arguments, settings, message in [
        ((longer, f, c), {}, "sweep.problem.horizon was 5, is 6"),
        ((given, f, c), {"checkpointing": bl.Checkpointing(block=2)}, "block was 1, is 2"),
        ((given, f + 1, c), {}, "sweep.given.observation was "),
        ((given, f, {**c, "a": c["a"] + 1}), {}, r"sweep.given.control\['a'\] was float64"),
        ((given, f, {**c, "a": real(1, 5)}), {}, r"is float64\[5\]"),
        ((given, f.float(), c), {}, "is float32"),
        ((given, f, c), {"keep_states": True}, "states was False, is True"),
        ((CASES["plain"][0], f, c), {}, "sweep.problem.dynamics.move was dropout"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            bl.adjoint(*arguments, keep=keep, resume=True, **settings)
    with pytest.raises(ArgumentError, match="holds checkpoints of an earlier run"):
        swept("drawn", "states", keep)
    with pytest.raises(ArgumentError, match="block=None makes it one"):
        graphs, other = bl.Checkpointing(block=None), bl.Keep(tmp_path / "other")
        bl.adjoint(*CASES["drawn"], checkpointing=graphs, keep=other)
    with pytest.raises(ArgumentError, match="got no keep"):
        swept("drawn", "states", resume=True)


def test_other_data_are_found_out_where_nothing_names_them(tmp_path):
    data = torch.ones(4, dtype=D)
    given = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(c * u + data * t)), lambda u, c: fuse() or square(u), T
    )
    fuse.set(1)
    with pytest.raises(PowerCutError):
        bl.adjoint(given, U, U, keep=bl.Keep(tmp_path, every=1))
    data += 1
    with pytest.raises(ArgumentError, match="gave another state when evaluated again"):
        bl.adjoint(given, U, U, keep=bl.Keep(tmp_path, every=1), resume=True)


def test_a_damaged_part_is_named_and_the_one_before_is_offered(tmp_path):
    whole, _ = evaluations("plain", "states", tmp_path / "whole", 1)
    keep = bl.Keep(tmp_path / "cut", every=1)
    fuse.set(6)
    with pytest.raises(PowerCutError):
        swept("plain", "states", keep)
    fuse.set(0)
    newest = max((tmp_path / "cut").glob("part-*"), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + b"!")
    with pytest.raises(StorageError, match=r"truncated or altered.*pass resume=3 to") as caught:
        swept("plain", "states", keep, resume=True)
    assert str(newest) in str(caught.value)
    assert same(swept("plain", "states", keep, resume=3), whole)


def test_a_folder_holds_no_more_than_its_checkpoints_name(tmp_path):
    fuse.set(0)
    swept("plain", "states", bl.Keep(tmp_path, every=1, last=1))
    assert len([*tmp_path.glob("part-*")]) == 1  # of u(0): the other blocks are behind
    assert len([*tmp_path.glob("update-*")]) == 1


def test_parts_of_a_run_that_was_killed_before_it_named_them_are_removed(tmp_path):
    (tmp_path / f"part-{'0' * 32}.safetensors").write_bytes(b"half")
    fuse.set(0)
    swept("plain", "states", bl.Keep(tmp_path, every=1))
    assert not (tmp_path / f"part-{'0' * 32}.safetensors").exists()


def test_what_is_not_finite_is_not_kept(tmp_path):
    given = bl.ControlProblem(bl.Map(lambda u, c, t: u * c / (3 - t)), lambda u, c: square(u), T)
    with pytest.raises(DivergenceError, match=r"u\(3\) is not finite after 3 steps of the sweep"):
        bl.adjoint(given, U, U, keep=bl.Keep(tmp_path, every=1))


def test_evolving_buffers_go_on(tmp_path):
    def made():
        norm = nn.BatchNorm1d(4, affine=False).double()

        def step(u, c, t):
            fuse()
            return torch.tanh(norm(u.expand(3, 4) * c + real(t, 3, 4)).mean(0))

        return bl.ControlProblem(bl.Map(step), lambda u, c: square(u * norm.running_mean), T), norm

    fuse.set(0)
    whole, norm = made()
    whole = bl.adjoint(whole, U, U)
    for at in (3, 9):
        fuse.set(at)
        keep = bl.Keep(tmp_path / str(at), every=1)
        with pytest.raises(PowerCutError):
            bl.adjoint(made()[0], U, U, keep=keep)
        fuse.set(0)
        again, other = made()
        again = bl.adjoint(again, U, U, keep=keep, resume=True)
        assert torch.equal(again.gradient, whole.gradient)
        assert torch.equal(again.cost, whole.cost)
        assert torch.equal(other.running_var, norm.running_var)
        assert torch.equal(other.num_batches_tracked, norm.num_batches_tracked)


def test_a_killed_process_leaves_a_sweep_that_goes_on(tmp_path):
    whole, n = evaluations("drawn", "one snapshot", tmp_path / "whole", 2)
    for at in (4, n - 4):
        keep = bl.Keep(tmp_path / str(at), every=2)
        child = os.fork()
        if not child:
            fuse.set(at, signal.SIGKILL)
            swept("drawn", "one snapshot", keep)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        fuse.set(0)
        assert same(swept("drawn", "one snapshot", keep, resume=True), whole)
        assert fuse.made <= n - at + 8
