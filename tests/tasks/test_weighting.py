"""Task weights: the weighted problem, its columns, what it refuses."""

import dataclasses
import math
import sys
from functools import partial

import pytest
import torch
from problems import real, square

import bilevel as bl
from bilevel.errors import (
    ArgumentError,
    DivergenceError,
    LostGradientError,
    StructureError,
    UnsupportedError,
)


def test_the_spread_is_log_n_where_weights_are_equal_and_its_slope_is_finite_at_zero_weights():
    weights = bl.TaskWeights(4, normalise=bl.Sparsemax())
    assert float(weights.spread(weights.sigma(weights.initial()))) == pytest.approx(math.log(4))
    alpha = torch.tensor([0.4, 0.1, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    spread = weights.spread(weights.sigma(alpha))
    (slope,) = torch.autograd.grad(spread, alpha)
    p = 0.65
    assert float(spread.detach()) == pytest.approx(
        -p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-12
    )
    torch.testing.assert_close(slope[:2].sum(), slope.new_zeros(()), atol=1e-12, rtol=0)
    assert float(slope[0]) == pytest.approx(-math.log(p / (1 - p)) / 2, abs=1e-12)


# Task i wants centre c_i, judged by the distance to v_j: theta = sum sigma_i c_i in closed form.
CENTRES, GOALS = real(3, 3, 2), real(4, 2, 2)


def train_losses(w, batch):
    return ((w - CENTRES) ** 2).sum(-1) / 2


def validation_losses(w, batch):
    return ((w - GOALS) ** 2).sum(-1) / 2


def solver(problem, method=None, steps=60, **settings):
    return bl.BilevelSolver(
        problem, bl.optim.SGD(0.5), steps, method or bl.MLM(), certificate=None, **settings
    )


METHODS = [bl.Unrolled(), bl.MLM(), bl.Implicit()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_the_hypergradient_of_a_vector_is_that_of_the_closed_form(method, floor, entropy):
    weights = bl.TaskWeights(3, floor=floor, entropy=entropy)
    problem = bl.weighted_problem(train_losses, validation_losses, weights)
    alpha = real(5, 3)

    def closed(a):
        sigma = weights.sigma(a)
        return validation_losses(sigma @ CENTRES, None).sum() - entropy * weights.spread(sigma)

    found = solver(problem, method).hypergradient(torch.zeros(2, dtype=torch.float64), alpha)
    torch.testing.assert_close(found.value, closed(alpha), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gradient, torch.func.grad(closed)(alpha), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("columns", [bl.Vmapped(), bl.Looped()], ids=repr)
def test_a_matrix_is_one_problem_a_column(method, columns):
    weights = bl.TaskWeights(3, 2, entropy=0.2)
    problem = bl.weighted_problem(train_losses, validation_losses, weights, columns)
    assert problem.columns == 2
    alpha = real(6, 3, 2)
    params = weights.stacked(torch.zeros(2, dtype=torch.float64))
    found = solver(problem, method).hypergradient(params, alpha)
    for j in range(2):
        alone = bl.weighted_problem(
            train_losses,
            lambda w, batch, j=j: validation_losses(w, batch)[j : j + 1],
            bl.TaskWeights(3, entropy=0.2),
        )
        column = solver(alone, method).hypergradient(
            torch.zeros(2, dtype=torch.float64), alpha[:, j].clone()
        )
        torch.testing.assert_close(found.params[j], column.params, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.gradient[:, j], column.gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("columns", [bl.Vmapped(), bl.Looped()], ids=repr)
@pytest.mark.parametrize("m", [None, 2])
def test_validation_losses_may_come_one_by_one_and_a_column_evaluates_its_own_alone(m, columns):
    calls = []

    def alone(w, batch, j):
        calls.append(j)
        return validation_losses(w, batch)[j]

    weights = bl.TaskWeights(3, m, entropy=0.2)
    params = weights.stacked(torch.zeros(2, dtype=torch.float64))
    alpha = real(6, *weights.shape)
    separate = [partial(alone, j=j) for j in range(2)]
    found, expected = (
        solver(bl.weighted_problem(train_losses, losses, weights, columns)).hypergradient(
            params, alpha
        )
        for losses in (separate, validation_losses)
    )
    assert calls == [0, 1]
    torch.testing.assert_close(found.value, expected.value, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=1e-14)


def test_validation_losses_one_by_one_must_be_as_many_as_columns_and_scalars():
    def build(losses, m=2):
        return bl.weighted_problem(train_losses, losses, bl.TaskWeights(3, m))

    for losses, m in (([validation_losses], 2), ([], None), (3, None)):
        with pytest.raises(ArgumentError, match="validation_losses must be a function, or"):
            build(losses, m)
    with pytest.raises(StructureError, match=r"validation_losses\[0\] must return a real scalar"):
        solver(build([validation_losses], None)).hypergradient(
            torch.zeros(2, dtype=torch.float64), real(6, 3)
        )


def network(params, x):
    return torch.tanh(x @ params["a"]) @ params["b"]


def test_vmapped_and_looped_columns_agree_through_second_derivatives():
    x, y = real(7, 3, 10, 4), real(8, 3, 10, 2)
    u, v = real(9, 2, 10, 4), real(10, 2, 10, 2)
    weights = bl.TaskWeights(3, 2)

    def train(p, batch):
        return torch.stack([square(network(p, x[i]) - y[i]) for i in range(3)]) / batch

    def validation(p, batch):
        return torch.stack([square(network(p, u[j]) - v[j]) for j in range(2)]) / batch

    params = {"a": real(11, 4, 5), "b": real(12, 5, 2), "count": 3}
    found = [
        solver(
            dataclasses.replace(bl.weighted_problem(train, validation, weights, columns)), steps=5
        ).hypergradient(weights.stacked(params), real(13, 3, 2), inner_batch=50.0, outer_batch=7.0)
        for columns in (bl.Vmapped(), bl.Looped())
    ]
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-12, atol=1e-13)
    assert found[0].params["count"] == 3


def test_looped_columns_may_hold_a_rollout_and_vmapped_ones_say_what_to_do():
    decay = bl.Map(lambda u, c, t: 0.5 * u + c)

    def train(w, batch):
        return square(bl.rollout(decay, CENTRES[:, 0], w, 3))[None]

    def validation(w, batch):
        return square(bl.rollout(decay, CENTRES[:, 0], w, 2))[None]

    weights = bl.TaskWeights(1, 1)
    params = weights.stacked(torch.ones(3, dtype=torch.float64))
    alpha = weights.initial(torch.float64)
    looped = bl.weighted_problem(train, validation, weights, bl.Looped())
    outcome = solver(looped, bl.Unrolled(), 3).hypergradient(params, alpha)
    # One task has weight 1 whatever alpha is.
    assert torch.equal(outcome.gradient, torch.zeros_like(alpha))
    vmapped = bl.weighted_problem(train, validation, weights)
    with pytest.raises(UnsupportedError, match=r"evaluate=Looped\(\).*through a rollout"):
        solver(vmapped, bl.Unrolled(), 3).hypergradient(params, alpha)


def test_learned_weights_leave_the_task_that_misleads():
    x = real(14, 4, 30, 3)
    truth = real(15, 3)
    y = torch.stack([x[i] @ (truth if i < 2 else -truth) for i in range(3)])
    goal = x[3] @ truth
    weights = bl.TaskWeights(3)
    problem = bl.weighted_problem(
        lambda w, batch: ((x[:3] @ w - y) ** 2).mean(-1),
        lambda w, batch: ((x[3] @ w - goal) ** 2).mean()[None],
        weights,
    )
    found = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 30, bl.Implicit(), certificate=None).solve(
        torch.zeros(3, dtype=torch.float64),
        weights.initial(torch.float64),
        lambda p: torch.optim.Adam(p, 0.3),
        steps=60,
    )
    sigma = weights.sigma(found.control)
    assert float(sigma[2]) < 0.02
    assert float(sigma[:2].min()) > 0.2


def test_floor_entropy_and_temperature_hold_against_collapse_to_one_task():
    # The goal is the first centre: without them the best weights are (1, 0, 0).
    def learned(**settings):
        weights = bl.TaskWeights(3, **settings)
        problem = bl.weighted_problem(
            train_losses, lambda w, batch: ((w - CENTRES[:1]) ** 2).sum(-1) / 2, weights
        )
        found = solver(problem, bl.Implicit(), steps=40).solve(
            torch.zeros(2, dtype=torch.float64),
            weights.initial(torch.float64),
            lambda p: torch.optim.Adam(p, 0.5),
            steps=30,
        )
        sigma = weights.sigma(found.control)
        return sigma, float(weights.spread(sigma))

    alone, spread = learned()
    assert float(alone[0]) > 0.99
    assert float(learned(floor=0.1)[0].min()) >= 0.1
    for held in ({"entropy": 0.2}, {"normalise": bl.Softmax(10.0)}):
        assert learned(**held)[1] > 3 * spread


def test_params_are_stacked_as_copies_for_a_matrix_and_left_for_a_vector():
    params = {"w": real(16, 3), "n": 4}
    stacked = bl.TaskWeights(2, 5).stacked(params)
    assert stacked["w"].shape == (5, 3)
    assert torch.equal(stacked["w"][4], params["w"])
    assert stacked["n"] == 4
    assert bl.TaskWeights(2).stacked(params) is params


def test_the_correlation_is_sigma_with_its_labels_drawn():
    weights = bl.TaskWeights(3, 2)
    alpha = real(17, 3, 2)
    found = weights.correlation(alpha, ["knee", "brain", "noise"], ["T1", "T2"])
    assert torch.equal(found.matrix, weights.sigma(alpha))
    (axes, _) = found.plot().axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["knee", "brain", "noise"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["T1", "T2"]
    written = [float(t.get_text()) for t in axes.texts]
    assert written == pytest.approx(found.matrix.flatten().tolist(), abs=0.005)
    vector = bl.TaskWeights(3).correlation(alpha[:, 0])
    assert vector.matrix.shape == (3, 1)
    assert vector.validations == ("all",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.TaskWeights(0), "n_tasks must be a whole number >= 1, got 0: give at least"),
        (lambda: bl.TaskWeights(2, 0), "n_validations must be a whole number >= 1, or None, got 0"),
        (lambda: bl.TaskWeights(2.0), "n_tasks must be a whole number"),
        (lambda: bl.TaskWeights(4, floor=0.26), "floor must be >= 0 and <= 0.25"),
        (lambda: bl.TaskWeights(4, floor=-0.1), "floor must be >= 0"),
        (lambda: bl.TaskWeights(4, entropy=-1.0), "entropy must be >= 0"),
        (lambda: bl.TaskWeights(4, entropy=math.inf), "entropy must be >= 0 and finite, got inf"),
        (lambda: bl.TaskWeights(4, normalise="softmax"), "normalise must be Softmax"),
        (lambda: bl.Softmax(0.0), "temperature must be > 0"),
        (lambda: bl.Sparsemax(-1.0), "temperature must be > 0"),
        (lambda: bl.tasks.NormalisedSigmoid(math.inf), "temperature must be > 0 and finite"),
        (lambda: bl.Vmapped("random"), "randomness must be"),
        (lambda: bl.weighted_problem(train_losses, validation_losses, 3), "must be a TaskWeights"),
        (
            lambda: bl.weighted_problem(train_losses, validation_losses, bl.TaskWeights(3), "vmap"),
            "evaluate must be Vmapped",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (
            torch.zeros(2),
            r"alpha must be a real tensor of shape \(3,\), got float32\[2\]",
        ),
        (torch.zeros(3, 1), r"shape \(3,\), got float32\[3, 1\]"),
        (torch.zeros(3, dtype=torch.complex64), "got complex64"),
        ({"a": torch.zeros(3)}, "got dict"),
    ],
)
def test_alpha_of_the_wrong_kind_is_refused(alpha, message):
    problem = bl.weighted_problem(train_losses, validation_losses, bl.TaskWeights(3))
    with pytest.raises(StructureError, match=message):
        solver(problem).hypergradient(torch.zeros(2), alpha)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (lambda w, b: train_losses(w, b)[:2], validation_losses, r"train_losses .* shape \(3,\)"),
        (lambda w, b: train_losses(w, b).sum(), validation_losses, "train_losses must return"),
        (lambda w, b: list(train_losses(w, b)), validation_losses, "got list; torch.stack"),
        (lambda w, b: train_losses(w, b) * 1j, validation_losses, "got complex128"),
        (train_losses, lambda w, b: CENTRES * w, r"validation_losses .* shape \(M,\)"),
        (
            train_losses,
            lambda w, b: validation_losses(w, b)[:0],
            r"validation_losses .* one loss a task, got float64\[0\]",
        ),
    ],
)
def test_losses_of_the_wrong_kind_are_refused(train, validation, message):
    problem = bl.weighted_problem(train, validation, bl.TaskWeights(3))
    with pytest.raises(StructureError, match=message):
        solver(problem).hypergradient(torch.zeros(2, dtype=torch.float64), real(5, 3))


@pytest.mark.parametrize("columns", [bl.Vmapped(), bl.Looped()], ids=repr)
def test_params_without_the_leading_axis_are_refused(columns):
    problem = bl.weighted_problem(train_losses, validation_losses, bl.TaskWeights(3, 2), columns)
    with pytest.raises(StructureError, match=r"leading axis of length 2.*stacked\(params\)"):
        solver(problem).hypergradient(torch.zeros(3, dtype=torch.float64), real(5, 3, 2))


def drawing_losses(w, batch):
    return train_losses(w, batch) * torch.rand(3, dtype=torch.float64)


def test_columns_draw_the_same_numbers_or_their_own_as_asked():
    weights, w = bl.TaskWeights(3, 2), real(20, 2)
    alpha, params = weights.initial(torch.float64), weights.stacked(w)
    drawn = {}
    for randomness in ("same", "different"):
        problem = bl.weighted_problem(
            drawing_losses, validation_losses, weights, bl.Vmapped(randomness)
        )
        torch.manual_seed(0)
        drawn[randomness] = problem.inner(params, alpha, None)
    torch.manual_seed(0)
    plain = train_losses(w, None) / 3
    same = 2 * (plain * torch.rand(3, dtype=torch.float64)).sum()
    torch.manual_seed(0)
    different = (plain * torch.rand(2, 3, dtype=torch.float64)).sum()
    torch.testing.assert_close(drawn["same"], same, rtol=1e-14, atol=0)
    torch.testing.assert_close(drawn["different"], different, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (drawing_losses, r"Vmapped\(randomness='different'\) or 'same', or Looped\(\).*randomness"),
        (lambda w, b: train_losses(w, b) * w.sum().item(), r"pass evaluate=Looped\(\).*\.item\(\)"),
        (
            lambda w, b: train_losses(w, b) if w.sum() > 0 else 2 * train_losses(w, b),
            r"pass evaluate=Looped\(\).*data-dependent",
        ),
    ],
)
def test_losses_that_vmap_refuses_are_refused_with_what_to_do(train, message):
    problem = bl.weighted_problem(train, validation_losses, bl.TaskWeights(3, 2))
    with pytest.raises(UnsupportedError, match=message):
        problem.inner(real(21, 2, 2), real(5, 3, 2), None)


def test_an_error_of_the_losses_themselves_passes_through_unchanged():
    def train(w, batch):
        raise RuntimeError("no such file")

    problem = bl.weighted_problem(train, validation_losses, bl.TaskWeights(3, 2))
    with pytest.raises(RuntimeError, match=r"^no such file$"):
        problem.inner(real(21, 2, 2), real(5, 3, 2), None)


FORMS = [
    (bl.TaskWeights(3), None),
    (bl.TaskWeights(3, 2), bl.Vmapped()),
    (bl.TaskWeights(3, 2), bl.Looped()),
]
each_form = pytest.mark.parametrize(("weights", "columns"), FORMS, ids=repr)


def asked(train, validation, weights, columns, method=None):
    problem = bl.weighted_problem(train, validation, weights, columns)
    params = weights.stacked(torch.zeros(2, dtype=torch.float64))
    return solver(problem, method, 3).hypergradient(params, weights.initial(torch.float64))


@each_form
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_tensors_hidden_in_the_losses_are_refused(weights, columns, method):
    hidden = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(LostGradientError, match=r"inner objective uses .* shape \(2,\)"):
        asked(lambda w, b: train_losses(w + hidden, b), validation_losses, weights, columns, method)
    with pytest.raises(LostGradientError, match=r"outer objective uses .* shape \(2,\)"):
        asked(train_losses, lambda w, b: validation_losses(w + hidden, b), weights, columns, method)


@each_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(weights, columns, bad):
    # A constant: the gradient in the params would be finite, and nothing else would notice.
    where = r"\[1\]" if columns is None else r"\[1\] of column 0"
    spoilt = torch.tensor([0.0, bad, 0.0], dtype=torch.float64)
    with pytest.raises(
        DivergenceError,
        match=rf"inner step 1: .* train_losses{where} is {bad}.*data of that",
    ):
        asked(lambda w, b: train_losses(w, b) + spoilt, validation_losses, weights, columns)
    # Column j is judged by validation loss j alone, so that the diagonal names the loss itself.
    with pytest.raises(DivergenceError, match=rf"validation_losses\[1\] is {bad}"):
        asked(train_losses, lambda w, b: validation_losses(w, b) + spoilt[:2], weights, columns)


def test_the_inner_step_at_which_losses_overflow_is_named():
    def train(w, batch):
        return (w.sum() + torch.zeros(3, dtype=torch.float64)).exp()

    problem = bl.weighted_problem(lambda w, b: -train(w, b), validation_losses, bl.TaskWeights(3))
    grown, steps = torch.zeros(2, dtype=torch.float64), 1
    while math.isfinite(float(grown.sum().exp())):
        grown, steps = grown + 0.5 * grown.sum().exp(), steps + 1
    with pytest.raises(DivergenceError, match=rf"inner step {steps}: .*and 2 more are not"):
        solver(problem).hypergradient(
            torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        )


@pytest.mark.parametrize("columns", [bl.Vmapped(), bl.Looped()], ids=repr)
def test_a_matrix_of_one_column_is_the_vector(columns):
    alpha, start = real(22, 3), real(23, 2)

    def validation(w, batch):
        return validation_losses(w, batch)[:1]

    vector, matrix = bl.TaskWeights(3, entropy=0.1), bl.TaskWeights(3, 1, entropy=0.1)
    one = solver(bl.weighted_problem(train_losses, validation, vector)).hypergradient(start, alpha)
    column = solver(bl.weighted_problem(train_losses, validation, matrix, columns)).hypergradient(
        matrix.stacked(start), alpha[:, None]
    )
    torch.testing.assert_close(column.value, one.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(column.params[0], one.params, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(column.gradient[:, 0], one.gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("columns", [bl.Vmapped(), bl.Looped()], ids=repr)
def test_a_column_does_not_see_the_weights_of_another(columns):
    weights, alpha = bl.TaskWeights(3, 2), real(24, 3, 2)
    changed = alpha.clone()
    changed[:, 1] += real(25, 3)
    start = weights.stacked(real(26, 2))
    asking = solver(bl.weighted_problem(train_losses, validation_losses, weights, columns))
    before, after = (asking.hypergradient(start, a) for a in (alpha, changed))
    assert torch.equal(before.params[0], after.params[0])
    assert torch.equal(before.gradient[:, 0], after.gradient[:, 0])
    assert not torch.equal(before.params[1], after.params[1])
    assert not torch.equal(before.gradient[:, 1], after.gradient[:, 1])


def test_vmapped_and_looped_columns_have_the_same_second_derivatives():
    weights = bl.TaskWeights(3, 2)
    params, alpha = real(27, 2, 2), real(28, 3, 2)

    def hessian(columns):
        problem = bl.weighted_problem(
            lambda w, b: torch.sin(w).sum() * train_losses(w, b),
            validation_losses,
            weights,
            columns,
        )
        return torch.autograd.functional.hessian(
            lambda p, a: problem.inner(p, a, None) * problem.outer(p, a, None), (params, alpha)
        )

    found, expected = hessian(bl.Vmapped()), hessian(bl.Looped())
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(found[i][j], expected[i][j], rtol=1e-12, atol=1e-12)


def test_a_map_of_weights_needs_matplotlib_and_alpha_of_the_right_shape(monkeypatch):
    weights = bl.TaskWeights(2)
    found = weights.correlation(torch.zeros(2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install matplotlib, or read \.matrix"):
        found.plot()
    with pytest.raises(StructureError, match=r"alpha must be .* shape \(2,\), got list"):
        weights.correlation([0.0, 0.0])
    with pytest.raises(StructureError, match="tasks must be 2 names, got 3"):
        weights.correlation(torch.zeros(2), ["a", "b", "c"])
    with pytest.raises(StructureError, match="validations must be 1 names, got 2"):
        weights.correlation(torch.zeros(2), validations=["a", "b"])
