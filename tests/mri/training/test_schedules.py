import math

import pytest

from applications.errors import InputError
from applications.mri.training.schedules import Constant, Cosine, Step


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_cosine_and_constant_are_what_they_are_called(share):
    assert Cosine().factor(share) == pytest.approx(math.cos(math.pi * share / 2) ** 2, abs=1e-15)
    assert Constant().factor(share) == 1


def test_a_step_falls_where_and_by_how_much_it_says():
    step = Step((0.25, 0.5), 0.2)
    shares = [0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0]
    assert [step.factor(s) for s in shares] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


@pytest.mark.parametrize("at", [(), (0.0, 0.5), (0.5, 0.5), (0.6, 0.5), (0.5, 1.0), (1.5,)])
def test_shares_that_do_not_increase_are_refused(at):
    with pytest.raises(InputError, match=r"at must hold increasing shares between 0 and 1, got"):
        Step(at)


@pytest.mark.parametrize("by", [0.0, -0.1, 1.5, math.nan])
def test_a_factor_out_of_range_is_refused(by):
    with pytest.raises(InputError, match=r"by must lie in \(0, 1\], got .*; the rate is multipli"):
        Step(by=by)
