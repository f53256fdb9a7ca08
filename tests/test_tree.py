"""Trees as a real vector space under Re<a, b>."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from problems import C128, F64, cplx, real
from reference import assert_same

import bilevel as bl
from bilevel import tree
from bilevel.errors import StructureError


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def vector(seed, sizes, dtype):
    """A tree of every container, with an integer, a bool and a None that do not count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {
        "z": [draw(n) for n in sizes],
        "real": (draw(2, dtype=F64), None),
        "pair": Pair(draw(), torch.tensor([True])),
        "n": torch.tensor(seed),
        "k": 3,
    }


trees = {
    "sizes": st.lists(st.integers(0, 4), max_size=3),
    "dtype": st.sampled_from([F64, C128]),
    "seed": st.integers(0, 2**16),
}
quick = settings(max_examples=25)


@quick
@given(**trees)
def test_inner_is_symmetric(sizes, dtype, seed):
    a, b = (vector(seed + i, sizes, dtype) for i in range(2))
    assert float(tree.inner(a, b)) == pytest.approx(float(tree.inner(b, a)), rel=1e-13, abs=1e-13)


@quick
@given(**trees, x=st.floats(-9, 9), y=st.floats(-9, 9))
def test_inner_is_linear_over_the_reals(sizes, dtype, seed, x, y):
    a, b, c = (vector(seed + i, sizes, dtype) for i in range(3))

    def combined(p, q):
        return x * p + y * q if tree.is_variable(p) else p

    left = float(tree.inner(c, tree.map_leaves(combined, a, b)))
    right = x * float(tree.inner(c, a)) + y * float(tree.inner(c, b))
    assert left == pytest.approx(right, rel=1e-11, abs=1e-11)


@quick
@given(**trees)
def test_inner_of_a_vector_with_itself_is_its_squared_norm(sizes, dtype, seed):
    a = vector(seed, sizes, dtype)
    flat = [
        torch.view_as_real(x.to(C128)).flatten() for x in tree.leaves_of(a) if tree.is_variable(x)
    ]
    truth = float(torch.cat(flat).square().sum())
    assert float(tree.inner(a, a)) == pytest.approx(truth, rel=1e-12)
    assert tree.norm(a) ** 2 == pytest.approx(truth, rel=1e-12)
    assert truth > 0


@quick
@given(**trees)
def test_inner_is_the_dot_product_of_real_and_imaginary_parts(sizes, dtype, seed):
    a, b = (vector(seed + i, sizes, dtype) for i in range(2))
    truth = sum(
        float(x.real @ y.real + (x.imag @ y.imag if x.is_complex() else 0))
        for x, y in (
            (p.flatten(), q.flatten())
            for p, q in zip(tree.leaves_of(a), tree.leaves_of(b), strict=True)
            if tree.is_variable(p)
        )
    )
    assert float(tree.inner(a, b)) == pytest.approx(truth, rel=1e-12, abs=1e-12)


def test_inner_of_vectors_without_variables_is_zero():
    assert float(tree.inner({"n": torch.tensor(3)}, {"n": None})) == 0
    assert tree.norm({"n": torch.tensor(3), "k": 2, "none": None}) == 0


def test_inner_of_one_imaginary_unit_and_one_is_zero():
    one, i = torch.tensor(1.0 + 0j), torch.tensor(1j)
    assert float(tree.inner(one, i)) == 0
    assert float(tree.inner(i, i)) == 1


@pytest.mark.parametrize("value", [1e200, math.inf, math.nan])
def test_norm_of_what_is_huge_or_not_finite_raises_nothing(value):
    x = torch.tensor(value, dtype=F64)
    assert tree.norm((x, x)) == pytest.approx(math.sqrt(2) * value, nan_ok=True)


def test_arithmetic_acts_on_variables_and_keeps_the_structure():
    a, b = real(1, 2), cplx(2, 2)
    x = {"a": a, "n": torch.tensor(1), "b": [b]}
    assert_same(tree.subtract(x, x), {"a": 0 * a, "n": None, "b": [0 * b]}, rtol=0)
    assert_same(tree.zeros_like(x), {"a": 0 * a, "n": None, "b": [0 * b]}, rtol=0)
    vector = {"a": a, "n": None, "b": [b]}
    assert_same(tree.negative(vector), {"a": -a, "n": None, "b": [-b]}, rtol=0)
    assert_same(tree.add(vector, vector), {"a": 2 * a, "n": None, "b": [2 * b]}, rtol=0)


def test_leaves_are_named_as_python_code_would_reach_them():
    control = bl.PerStep([{"w": [real(1, 1)]}], initial=Pair(real(2, 1), real(3, 1)), shared=1)
    assert tree.leaf_names(control, "control") == [
        "control.steps[0]['w'][0]",
        "control.initial.a",
        "control.initial.b",
        "control.shared",
    ]
    assert tree.leaf_names(real(1, 1), "state") == ["state"]


def test_flattening_and_back_gives_the_same_tree():
    control = bl.PerStep([{"w": real(1, 2)}, {"w": real(2, 2)}], None, (real(3, 1), 4, None))
    leaves, structure = tree.flatten(control)
    again = tree.unflatten(structure, leaves)
    assert isinstance(again, bl.PerStep)
    assert again.steps[1]["w"] is control.steps[1]["w"]
    assert again.shared[1:] == (4, None)


def test_distinct_leaves_name_each_object_once():
    x, y = real(1, 1), real(1, 1)
    assert [id(z) for z in tree.distinct_leaves([x, (y, x)])] == [id(x), id(y)]


def test_detach_shares_memory_and_drops_history():
    x = real(1, 2).requires_grad_()
    found = tree.detach({"x": x * 2, "raw": x, "k": 1})
    assert not found["x"].requires_grad
    assert found["raw"].data_ptr() == x.data_ptr()
    assert found["k"] == 1


@pytest.mark.parametrize("leaf", [1.0, 2j, "a", object()])
def test_a_leaf_that_would_lose_its_gradient_is_refused_by_name(leaf):
    with pytest.raises(StructureError, match=r"f\['mask'\]\[1\] must be a tensor"):
        tree.check_leaves({"mask": [None, leaf]}, "f")


def test_integers_bools_and_none_are_allowed_as_leaves():
    tree.check_leaves([1, True, None, torch.tensor(2)], "f")


def test_check_like_names_what_differs():
    x = {"a": real(1, 2), "k": 1}
    tree.check_like({"a": real(2, 2), "k": 5}, x, "u", "who")
    with pytest.raises(StructureError, match=r"who: u\['a'\] must be float64\[2\] .* float64\[3\]"):
        tree.check_like({"a": real(2, 3), "k": 1}, x, "u", "who")
    with pytest.raises(StructureError, match=r"who: u\['k'\] must be int, got float"):
        tree.check_like({"a": real(2, 2), "k": 1.0}, x, "u", "who")
    with pytest.raises(StructureError, match=r"who: u must be .*'a'.*, got .*'b'"):
        tree.check_like({"b": real(2, 2), "k": 1}, x, "u", "who")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *[(torch.float32, size) for size in (1e-30, 1e-25, 1e-20, 1e-5, 1e12, 1e25)],
        *[(torch.float64, size) for size in (1e-250, 1e-160, 1.0, 1e200)],
        *[(torch.float16, size) for size in (1e-6, 1.0, 6e3)],
        *[(torch.bfloat16, size) for size in (1e-25, 1e25)],
        *[(torch.complex64, size) for size in (1e-25, 1e25)],
    ],
    ids=str,
)
def test_a_norm_neither_overflows_nor_underflows(dtype, size):
    x = torch.full((400,), size, dtype=dtype)
    expected = float(x[0].abs()) * 20  # the number as it was rounded
    tolerance = 100 * torch.finfo(dtype).eps
    assert tree.norm({"x": x, "n": 3}) == pytest.approx(expected, rel=tolerance)
    assert tree.norm([x, x]) == pytest.approx(expected * 2**0.5, rel=tolerance)


def test_a_norm_tells_what_is_not_finite():
    for bad in (math.inf, -math.inf, math.nan):
        assert not math.isfinite(tree.norm(torch.tensor([1.0, bad])))
    assert tree.norm(torch.zeros(3)) == 0
    assert tree.norm(torch.zeros(0)) == 0


@dataclass
class Parts:
    rate: torch.Tensor


@pytest.mark.parametrize(
    ("leaf", "remedy"),
    [
        (Parts(torch.ones(2)), "pass its fields as a dict"),
        ("adam", "let the functions close over it"),
        (0.5, "wrap it with torch.as_tensor"),
        (np.ones(2), "wrap it with torch.as_tensor"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_leaf_that_is_no_tensor_is_refused_with_what_to_do(leaf, remedy):
    with pytest.raises(StructureError, match=remedy):
        tree.check_leaves({"a": torch.ones(2), "b": leaf}, "control")
