"""The file that differentiates: conventions, frozen places, hidden tensors."""

import pytest
import torch
from problems import cplx, real, square
from reference import assert_same, autograd, fresh

from bilevel import autodiff, tree
from bilevel.autodiff import gradients, junctions
from bilevel.errors import LostGradientError


def test_the_gradient_of_the_squared_modulus_is_twice_the_argument():
    z = cplx(1, 3)
    value, (gradient,) = autodiff.value_and_gradient(square, z, name="square")
    assert_same(gradient, 2 * z, rtol=1e-15)
    assert_same(value, square(z), rtol=0)


def test_pull_of_a_map_that_is_not_holomorphic_is_its_adjoint_under_the_real_inner_product():
    # y = a z + b conj(z): the adjoint is conj(a) v + b conj(v).
    a, b, z, v = (cplx(i, 3) for i in range(4))
    variable = autodiff.variables(z)
    assert_same(
        autodiff.pull(a * variable + b * variable.conj(), v, variable),
        a.conj() * v + b * v.conj(),
        rtol=1e-15,
    )


def test_pull_passes_the_dot_product_test_on_trees_of_real_and_complex_leaves():
    def f(x):
        return {"y": x["a"] * x["z"].conj() + 1j * x["a"] ** 2, "w": (x["z"] * x["a"]).imag}

    x, d = ({"a": real(i, 3), "z": cplx(i, 3), "n": 2} for i in (5, 6))
    tangent = {  # by the product rule
        "y": d["a"] * x["z"].conj() + x["a"] * d["z"].conj() + 2j * x["a"] * d["a"],
        "w": (d["z"] * x["a"] + x["z"] * d["a"]).imag,
    }
    v = {"y": cplx(7, 3), "w": real(8, 3)}
    variable = autodiff.variables(x)
    pulled = autodiff.pull(f(variable), v, variable)
    assert pulled["n"] is None
    left, right = tree.inner(v, tangent), tree.inner(pulled, d)
    assert left.item() == pytest.approx(right.item(), rel=1e-13)


def test_a_real_argument_of_a_complex_map_gets_the_real_part():
    a, z, v = real(1, 3), cplx(2, 3), cplx(3, 3)
    variable = autodiff.variables(a)
    assert_same(autodiff.pull(variable * z, v, variable), (z.conj() * v).real, rtol=1e-15)


def test_pull_gives_none_where_nothing_depends_on_the_leaf():
    x, y = autodiff.variables((real(1, 2), real(2, 2)))
    assert autodiff.pull(x * 2, real(3, 2), (x, y))[1] is None
    assert autodiff.pull(real(4, 2), real(3, 2), (x, y)) == (None, None)
    assert autodiff.pull(x * 2, None, (x, y)) == (None, None)


def test_variables_share_memory_and_leave_the_original_alone():
    x = real(1, 2)
    made = autodiff.variables({"x": x, "n": torch.tensor(1), "k": 2})
    assert made["x"].requires_grad
    assert made["x"].data_ptr() == x.data_ptr()
    assert not x.requires_grad
    assert not made["n"].requires_grad
    assert made["k"] == 2


def test_told_apart_gives_each_place_the_cotangent_of_its_own_uses():
    x = autodiff.variables(real(1, 2))
    first, second, constant = autodiff.told_apart((x, x, real(2, 2)), set())
    y = 2 * first + 3 * second + 5 * constant
    one = torch.ones(2, dtype=torch.float64)
    found = autodiff.pull(y, one, (first, second, constant, x))
    assert [g[0].item() for g in found] == [2, 3, 5, 5]


def test_told_apart_makes_a_tensor_its_own_once():
    known, x = set(), autodiff.variables(real(1, 2))
    first = autodiff.told_apart(2 * x, known)
    second = autodiff.told_apart(first, known)
    third = autodiff.told_apart(x, known)
    y = first.sum() + 3 * second.sum() + 5 * third.sum()
    one = torch.ones((), dtype=torch.float64)
    found = autodiff.pull(y, one, (second, third, first, x))
    assert [g[0].item() for g in found] == [3, 5, 4, 13]


def test_a_hidden_tensor_behind_operations_is_found():
    hidden, x = fresh(real(1, 2)), autodiff.variables(real(2, 2))
    deep = x * (hidden * 2).exp().sum()
    with pytest.raises(LostGradientError, match=r"f uses a tensor of shape \(2,\)"):
        autodiff.refuse_hidden(deep, (x,), "f")
    autodiff.refuse_hidden(deep, (x, hidden), "f")
    autodiff.refuse_hidden((x * 2, real(3, 2), 4), x, "f")


def test_value_and_gradient_of_several_arguments_is_that_of_autograd():
    x, c = real(1, 3), {"c": cplx(2, 3), "n": 1}

    def f(x, c):
        return square(torch.sin(x * c["c"])) * c["n"]

    value, found = autodiff.value_and_gradient(f, x, c, name="f")
    inputs = fresh(x), fresh(c)
    truth = autograd(f(*inputs), *inputs)
    assert_same(found, truth)
    assert not value.requires_grad


@pytest.mark.parametrize("complex_", [False, True])
def test_the_short_way_to_the_engine_finds_what_autograd_does(monkeypatch, complex_):
    """Torch's own, private way in is taken for plain tensors; without it `autograd.grad` is."""
    x = (cplx if complex_ else real)(0, 4).requires_grad_()

    def found():
        (slope,) = gradients.grad([square(x)], [x], None, create_graph=True)
        assert slope.requires_grad
        return slope.detach(), *gradients.grad([slope], [x], [torch.ones_like(slope)])

    quick = found()
    monkeypatch.setattr(junctions, "_engine", None)
    for mine, theirs in zip(quick, found(), strict=True):
        assert_same(mine, theirs, rtol=0)
    assert not quick[1].requires_grad


def test_a_subclass_of_tensors_is_differentiated_by_its_own_rules():
    calls = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = real(0, 3).as_subclass(Watched).requires_grad_()
    (slope,) = gradients.grad([(x * x).sum()], [x], None)
    assert torch.autograd.grad in calls
    assert_same(slope.as_subclass(torch.Tensor), 2 * x.detach().as_subclass(torch.Tensor), rtol=0)


def test_a_cotangent_is_left_out_of_scalars_alone():
    x = real(0, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        gradients.grad([x * 2], [x], None)
