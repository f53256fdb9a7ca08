"""Batches evaluated part by part: the same numbers, and the graph of one part at a time."""

from dataclasses import replace

import pytest
import rank_cases
import torch
from problems import F64, real

import bilevel as bl
from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.sweeps import LiveBytes

NET = rank_cases.solvers()


@pytest.mark.parametrize("name", NET)
def test_parts_of_a_batch_give_the_solution_of_the_whole(name):
    solver, params, control, pair = NET[name]
    given = {"steps": 2, "batches": [pair]}
    solver = replace(solver, on_failure="ignore")
    whole = solver.solve(params, control, **given)
    parts = replace(solver, micro_batches=3).solve(params, control, **given)
    assert rank_cases.distance(parts.control, whole.control) < 1e-12
    assert rank_cases.distance(parts.params, whole.params) < 1e-12
    assert parts.values == pytest.approx(whole.values, rel=1e-12)


def test_the_graph_of_one_part_lives_at_a_time():
    batch = real(1, 4096, 8), real(2, 4096)

    def loss(w, c, b):
        hidden = torch.tanh(b[0] @ w)
        return ((torch.tanh(hidden).sum(1) - b[1]) ** 2).mean() + c * w.square().sum()

    solver = bl.BilevelSolver(
        bl.BilevelProblem(loss, loss), bl.optim.SGD(0.01), 3, bl.MLM(), certificate=None
    )

    def peak(n):
        with LiveBytes() as live:
            replace(solver, micro_batches=n).hypergradient(
                *(0.1 * real(3, 8, 32), torch.tensor(0.1, dtype=F64)), batch, batch
            )
        return live.peak

    assert peak(8) < 0.3 * peak(1)


def test_what_is_drawn_for_a_part_is_drawn_again_when_it_is_evaluated_again():
    def inner(w, c, b):
        kept = torch.nn.functional.dropout(torch.ones_like(b), 0.5)
        return (kept * (w.sin() - b) ** 2).mean() + c * w.square().sum()

    problem = bl.BilevelProblem(inner, lambda w, c, b: (w**3 - b).square().mean())
    found = []
    for method in (bl.MLM(), bl.Unrolled(), bl.MLM(bl.Checkpointing(block=None))):
        torch.manual_seed(0)
        solver = bl.BilevelSolver(
            problem, bl.optim.SGD(0.1), 4, method, certificate=None, micro_batches=4
        )
        data = real(1, 12, 3)
        solution = solver.solve(
            *(real(2, 3), torch.tensor(0.1, dtype=F64)),
            steps=2,
            batches=[(data, data)],
        )
        found.append((solution.control, torch.rand(3)))
    for control, after in found[1:]:
        torch.testing.assert_close(control, found[0][0], rtol=1e-13, atol=0)
        assert torch.equal(after, found[0][1])  # the generator ends where it would


def test_what_cannot_be_evaluated_in_parts_is_refused():
    solver, params, control, pair = NET["MLM"]
    with pytest.raises(ArgumentError, match="12 samples, which 5 micro-batches cannot share"):
        replace(solver, micro_batches=5).solve(params, control, batches=[pair])
    with pytest.raises(ArgumentError, match="micro_batches must be a whole number >= 1"):
        replace(solver, micro_batches=0)
    sums = replace(solver.problem, outer=lambda w, c, b: ((w["v"].sum() - b[1]) ** 2).sum())
    with pytest.raises(ArgumentError, match=r"its mean over 3 parts of it is .* a mean over"):
        replace(solver, problem=sums, micro_batches=3).solve(params, control, batches=[pair])
    with pytest.raises(UnsupportedError, match="leave replicas= and micro_batches= out for it"):
        replace(solver, micro_batches=3).hvp(params, control, control, *pair)
    root = bl.BilevelProblem(outer=sums.outer, residual=lambda w, c, b: w)
    for problem, rule, text in (
        (root, bl.optim.FixedPoint(), "this problem is by its residual="),
        (solver.problem, bl.Given(lambda w, c, b: w), "Given solves the inner problem by itself"),
        (solver.problem, bl.optim.Anderson(), "Anderson solves the inner problem by itself"),
        (solver.problem, bl.optim.NewtonKrylov(), "NewtonKrylov solves the inner problem"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            bl.BilevelSolver(problem, rule, 3, bl.Implicit(), micro_batches=3)


@pytest.mark.parametrize("name", ["MLM", "Unrolled", "Implicit"])
def test_many_outers_are_pulled_through_parts(name):
    solver, params, control, pair = NET[name]
    outers = [rank_cases.outer, lambda w, c, b: w["v"].cosh().sum() + (b[1] ** 2).mean()]
    whole = solver.hypergradients(params, control, outers, *pair)
    parts = replace(solver, micro_batches=3).hypergradients(params, control, outers, *pair)
    for one, other in zip(whole, parts, strict=True):
        assert rank_cases.distance(other.gradient, one.gradient) < 1e-12
        assert float(other.value) == pytest.approx(float(one.value), rel=1e-12)
