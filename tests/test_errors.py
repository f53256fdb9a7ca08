"""Every error is ours and a fitting built-in."""

import inspect

import pytest

import bilevel as bl
from bilevel import errors

BUILT_IN = {
    "ArgumentError": ValueError,
    "StructureError": ValueError,
    "LostGradientError": ValueError,
    "UnsupportedError": NotImplementedError,
    "StorageError": OSError,
    "ConvergenceError": RuntimeError,
    "DivergenceError": ArithmeticError,
    "ParallelError": RuntimeError,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_is_a_bilevel_error_and_a_built_in(name):
    error = getattr(errors, name)
    assert issubclass(error, bl.BilevelError)
    assert issubclass(error, BUILT_IN[name])
    with pytest.raises(BUILT_IN[name], match="why"):
        raise error("why")


def test_the_table_above_is_complete():
    found = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.BilevelError)
    }
    assert found == {*BUILT_IN, "BilevelError"}


def test_the_warning_is_a_user_warning():
    assert issubclass(bl.ConvergenceWarning, UserWarning)
    assert not issubclass(bl.ConvergenceWarning, bl.BilevelError)
