"""Task weights: the simplex, the weighted problem, columns."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import real, square

import bilevel as bl

NORMALISERS = [
    bl.Softmax(),
    bl.Softmax(0.3),
    bl.Sparsemax(),
    bl.Sparsemax(2.0),
    bl.NormalisedSigmoid(),
    bl.NormalisedSigmoid(0.5),
]
each_normaliser = pytest.mark.parametrize("normalise", NORMALISERS, ids=repr)
alphas = st.lists(st.floats(-1000, 1000), min_size=3, max_size=3)


@each_normaliser
@given(alphas, st.floats(0, 1 / 3))
def test_weights_are_at_least_the_floor_and_sum_to_one(normalise, alpha, floor):
    weights = bl.TaskWeights(3, normalise=normalise, floor=floor)
    sigma = weights.sigma(torch.tensor(alpha, dtype=torch.float64))
    assert float(sigma.min()) >= floor - 1e-12
    assert float(sigma.sum()) == pytest.approx(1, abs=1e-12)


@each_normaliser
def test_columns_are_normalised_on_their_own_and_tasks_are_interchangeable(normalise):
    alpha, order = real(1, 4, 3), torch.tensor([2, 0, 3, 1])
    sigma = normalise(alpha)
    for j in range(3):
        torch.testing.assert_close(sigma[:, j], normalise(alpha[:, j]), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(normalise(alpha[order]), sigma[order], rtol=1e-14, atol=1e-15)


@each_normaliser
def test_weights_have_the_derivative_of_finite_differences(normalise):
    alpha = torch.tensor([0.3, -0.2, 0.1, -5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalise, alpha)
    assert torch.autograd.gradgradcheck(normalise, alpha)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    # Brute force: the projection on the face of every support, the nearest one that is feasible.
    alpha = real(2, 4)
    best = None
    for size in range(1, 5):
        for support in itertools.combinations(range(4), size):
            face = torch.zeros(4, dtype=torch.float64)
            chosen = alpha[list(support)]
            face[list(support)] = chosen + (1 - chosen.sum()) / size
            distance = float(square(face - alpha))
            if bool((face >= 0).all()) and (best is None or distance < best[0]):
                best = distance, face
    torch.testing.assert_close(bl.Sparsemax()(alpha), best[1], rtol=1e-12, atol=1e-14)


def test_temperature_goes_from_one_task_to_all_alike():
    alpha = torch.tensor([0.5, 0.4, -1.0], dtype=torch.float64)
    for kind in (bl.Softmax, bl.Sparsemax):
        assert kind(1e-3)(alpha).tolist() == pytest.approx([1, 0, 0], abs=1e-12)
        assert kind(1e6)(alpha).tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_sigmoids_that_all_underflow_still_have_their_ratios():
    alpha = torch.tensor([-2000.0, -2001.0], dtype=torch.float64)
    expected = torch.softmax(alpha, 0)
    torch.testing.assert_close(bl.NormalisedSigmoid()(alpha), expected, rtol=1e-12, atol=0)


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
        problem, bl.GradientDescent(0.5), steps, method or bl.MLM(), certificate=None, **settings
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
    with pytest.raises(bl.UnsupportedError, match=r"torch\.func"):
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
    found = bl.BilevelSolver(
        problem, bl.GradientDescent(0.2), 30, bl.Implicit(), certificate=None
    ).solve(
        torch.zeros(3, dtype=torch.float64),
        weights.initial(torch.float64),
        lambda p: torch.optim.Adam(p, 0.3),
        steps=60,
    )
    sigma = weights.sigma(found.control)
    assert float(sigma[2]) < 0.02
    assert float(sigma[:2].min()) > 0.2


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
        (lambda: bl.TaskWeights(2, 0), "n_validations must be a whole number >= 1, got 0"),
        (lambda: bl.TaskWeights(2.0), "n_tasks must be a whole number"),
        (lambda: bl.TaskWeights(4, floor=0.26), "floor must be >= 0 and <= 1 / n_tasks = 0.25"),
        (lambda: bl.TaskWeights(4, floor=-0.1), "floor must be >= 0"),
        (lambda: bl.TaskWeights(4, entropy=-1.0), "entropy must be >= 0"),
        (lambda: bl.TaskWeights(4, normalise="softmax"), "normalise must be Softmax"),
        (lambda: bl.Softmax(0.0), "temperature must be > 0"),
        (lambda: bl.Sparsemax(-1.0), "temperature must be > 0"),
        (lambda: bl.NormalisedSigmoid(math.inf), "temperature must be > 0 and finite"),
        (lambda: bl.Vmapped("random"), "randomness must be"),
        (lambda: bl.weighted_problem(train_losses, validation_losses, 3), "must be a TaskWeights"),
        (
            lambda: bl.weighted_problem(train_losses, validation_losses, bl.TaskWeights(3), "vmap"),
            "columns must be Vmapped",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(bl.ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (
            torch.zeros(2),
            r"alpha must be a real tensor of shape \(3,\), got torch.float32 of shape",
        ),
        (torch.zeros(3, 1), r"shape \(3,\), got torch.float32 of shape \(3, 1\)"),
        (torch.zeros(3, dtype=torch.complex64), "got torch.complex64"),
        ({"a": torch.zeros(3)}, "got dict"),
    ],
)
def test_alpha_of_the_wrong_kind_is_refused(alpha, message):
    problem = bl.weighted_problem(train_losses, validation_losses, bl.TaskWeights(3))
    with pytest.raises(bl.StructureError, match=message):
        solver(problem).hypergradient(torch.zeros(2), alpha)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (lambda w, b: train_losses(w, b)[:2], validation_losses, r"train_losses .* shape \(3,\)"),
        (lambda w, b: train_losses(w, b).sum(), validation_losses, "train_losses must return"),
        (lambda w, b: list(train_losses(w, b)), validation_losses, "got list; torch.stack"),
        (lambda w, b: train_losses(w, b) * 1j, validation_losses, "got torch.complex128"),
        (train_losses, lambda w, b: CENTRES * w, r"validation_losses .* shape \(M,\)"),
    ],
)
def test_losses_of_the_wrong_kind_are_refused(train, validation, message):
    problem = bl.weighted_problem(train, validation, bl.TaskWeights(3))
    with pytest.raises(bl.StructureError, match=message):
        solver(problem).hypergradient(torch.zeros(2, dtype=torch.float64), real(5, 3))


@pytest.mark.parametrize("columns", [bl.Vmapped(), bl.Looped()], ids=repr)
def test_params_without_the_leading_axis_are_refused(columns):
    problem = bl.weighted_problem(train_losses, validation_losses, bl.TaskWeights(3, 2), columns)
    with pytest.raises(bl.StructureError, match=r"leading axis of length 2.*stacked\(params\)"):
        solver(problem).hypergradient(torch.zeros(3, dtype=torch.float64), real(5, 3, 2))


def test_columns_that_draw_are_refused_unless_asked_for():
    def train(w, batch):
        return train_losses(w + 0 * torch.rand(2, dtype=torch.float64), batch)

    weights = bl.TaskWeights(3, 2)
    params = weights.stacked(torch.zeros(2, dtype=torch.float64))
    drawn = bl.weighted_problem(train, validation_losses, weights, bl.Vmapped("different"))
    solver(drawn).hypergradient(params, real(5, 3, 2))
    with pytest.raises(RuntimeError, match="randomness"):
        solver(bl.weighted_problem(train, validation_losses, weights)).hypergradient(
            params, real(5, 3, 2)
        )
