"""Normalisers: from unconstrained numbers to the simplex."""

import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from problems import real, square

import bilevel as bl

NORMALISERS = [
    bl.Softmax(),
    bl.Softmax(0.3),
    bl.Sparsemax(),
    bl.Sparsemax(2.0),
    bl.tasks.NormalisedSigmoid(),
    bl.tasks.NormalisedSigmoid(0.5),
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


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_sparsemax_is_the_nearest_point_of_the_simplex(seed, temperature):
    # Brute force: the projection on the face of every support, the nearest one that is feasible.
    alpha = real(seed, 4) / temperature
    best = None
    for size in range(1, 5):
        for support in itertools.combinations(range(4), size):
            face = torch.zeros(4, dtype=torch.float64)
            chosen = alpha[list(support)]
            face[list(support)] = chosen + (1 - chosen.sum()) / size
            distance = float(square(face - alpha))
            if bool((face >= 0).all()) and (best is None or distance < best[0]):
                best = distance, face
    found = bl.Sparsemax(temperature)(temperature * alpha)
    torch.testing.assert_close(found, best[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparsemax_of_numbers_that_dwarf_one_is_still_on_the_simplex(dtype):
    # 1e9 - 1 is 1e9 in float32: sums and supports must not depend on it.
    assert bl.Sparsemax()(torch.tensor([1e9, 0.0, 1.0], dtype=dtype)).tolist() == [1, 0, 0]
    near = torch.tensor([3e6, 3e6 - 0.5, 0.0], dtype=dtype)
    assert bl.Sparsemax()(near).tolist() == [0.75, 0.25, 0]
    assert bl.Sparsemax(1e-30)(torch.tensor([1.0, 0.0, 1.0], dtype=dtype)).tolist() == [0.5, 0, 0.5]


@each_normaliser
def test_weights_of_nan_are_nan_for_the_solver_to_name(normalise):
    assert bool(normalise(torch.tensor([float("nan"), 0.0, 1.0])).isnan().all())


@each_normaliser
def test_normalisers_work_under_vmap(normalise):
    alphas = real(3, 5, 4, 2)
    found = torch.func.vmap(normalise)(alphas)
    expected = torch.stack([normalise(alpha) for alpha in alphas])
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softmax_and_sigmoid_are_what_their_names_say(temperature):
    alpha = real(4, 4, 2)
    e, s = (alpha / temperature).exp(), 1 / (1 + (-alpha / temperature).exp())
    torch.testing.assert_close(bl.Softmax(temperature)(alpha), e / e.sum(0), rtol=1e-13, atol=0)
    found = bl.tasks.NormalisedSigmoid(temperature)(alpha)
    torch.testing.assert_close(found, s / s.sum(0), rtol=1e-13, atol=0)


def test_temperature_goes_from_one_task_to_all_alike():
    alpha = torch.tensor([0.5, 0.4, -1.0], dtype=torch.float64)
    for kind in (bl.Softmax, bl.Sparsemax):
        assert kind(1e-3)(alpha).tolist() == pytest.approx([1, 0, 0], abs=1e-12)
        assert kind(1e6)(alpha).tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_sigmoids_that_all_underflow_still_have_their_ratios():
    alpha = torch.tensor([-2000.0, -2001.0], dtype=torch.float64)
    expected = torch.softmax(alpha, 0)
    torch.testing.assert_close(bl.tasks.NormalisedSigmoid()(alpha), expected, rtol=1e-12, atol=0)
