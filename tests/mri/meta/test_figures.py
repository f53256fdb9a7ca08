import pytest
import torch

import bilevel as bl
from applications.pictures import blank_figure


def test_weights_are_drawn_in_axes_that_are_given_on_one_scale_of_colours():
    figure = blank_figure(3, 2)
    axes = figure.subplots(1, 2)
    weights = torch.tensor([[0.7, 0.4], [0.3, 0.6]])
    found = bl.tasks.Correlation(weights, ("a", "b"), ("x", "a long name"))
    for axis in axes:
        assert found.plot(axis, largest=0.9) is figure
        assert axis.images[0].get_clim() == (0, pytest.approx(0.9))
    assert len(figure.axes) == 2  # no bar of colours beside them


def test_gains_are_coloured_around_0_and_written_with_their_sign():
    gains = torch.tensor([[0.5, -2.0]])
    axis = blank_figure(3, 2).add_subplot()
    bl.tasks.Correlation(gains, ("model",), ("x", "y")).plot(axis)
    assert axis.images[0].get_clim() == (-2, 2)
    assert [text.get_text() for text in axis.texts] == ["+0.50", "-2.00"]
