"""Adaptation to a scan: kept where samples that it never saw are predicted better."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from applications.errors import InputError
from applications.mri.data import UnusableSliceError
from applications.mri.network.architecture import light
from applications.mri.network.held_out import held_out
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained
from applications.mri.sampling import PoissonDisc
from applications.mri.simulation.simulate import simulate
from applications.mri.training.adaptation import Adaptation, adapted
from bilevel import tree

SIZE = 48


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def slices(n=2):
    disc = torch.zeros(SIZE, SIZE)
    disc[10:38, 12:36] = 0.6
    disc[20:26, 16:30] = 1.0
    found = []
    for k in range(n):
        mask = PoissonDisc(3, 12).mask((SIZE, SIZE), seeded(k))
        found.append((simulate(disc, 3, seeded(k + 9), 0.01).kspace * mask, mask))
    return found


def off():
    """A network whose thresholds are far too large: steps on the scan itself make it better."""
    network = Network(replace(light(), n_phases=2, warm_up=4), 0)
    control = tree.map_leaves(lambda x: x, network.controls())
    for step in control.steps:
        step["gains.log_threshold"] += 2.0
    return Trained(network, control, {})


def test_what_is_off_is_adapted_and_kept():
    found = adapted(off(), slices(), 6)
    assert found.kept
    assert found.after < found.before
    assert "; kept." in str(found)


def test_what_becomes_worse_is_not_kept(monkeypatch):
    monkeypatch.setattr("applications.mri.training.adaptation._RATE", 3.0)
    begin = off()
    found = adapted(begin, slices(), 4)
    assert found.after >= found.before
    assert found.trained is begin
    assert "; not kept." in str(found)


def test_samples_held_out_for_the_verdict_are_never_trained_on():
    begin, given = off(), slices()
    changed = [(torch.where(held_out(m)[1], 50 * k, k), m) for k, m in given]
    first, second = (adapted(begin, one, 3, seed=4) for one in (given, changed))
    if first.kept and second.kept:
        for x, y in zip(
            tree.leaves_of(first.trained.control),
            tree.leaves_of(second.trained.control),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
    assert second.before != first.before


def test_nothing_to_do_is_refused():
    with pytest.raises(InputError, match="at least one step and one slice"):
        adapted(off(), slices(), 0)
    with pytest.raises(InputError, match="at least one step and one slice"):
        adapted(off(), [], 3)


def test_errors_that_are_equal_keep_the_first():
    trained = off()
    assert not Adaptation(trained, 0.3, 0.3).kept


class Spoilt(Sequence):
    """Slices some of which cannot be used."""

    def __init__(self, given, bad):
        self.given, self.bad, self.read = given, bad, []

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.bad:
            raise UnusableSliceError(f"slice {index} is zero throughout")
        return self.given[index]


@pytest.mark.parametrize("bad", [{0, 1, 3}, pytest.param({2}, marks=pytest.mark.slow)])
def test_slices_that_cannot_be_used_are_left_out(bad):
    given = Spoilt(slices(4), bad)
    found = adapted(off(), given, 6)
    assert found.kept
    assert all(given.read.count(index) <= 1 for index in bad)


def test_a_scan_without_any_slice_that_can_be_used_is_refused():
    with pytest.raises(UnusableSliceError, match="zero throughout"):
        adapted(off(), Spoilt(slices(3), {0, 1, 2}), 2)


def separate(n=2):
    """Every second column, none of them calibrating, and calibration that is no part of it."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:, ::2] = True
    centre = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    centre[12:36, 12:36] = True
    disc = torch.zeros(SIZE, SIZE)
    disc[10:38, 12:36] = 0.6
    scans = [simulate(disc, 4, seeded(k), 0.01).kspace for k in range(n)]
    # The calibration was measured at another receiver gain: it must not be taken for samples.
    return [(k * mask, mask, 5 * k * centre) for k in scans]


def test_calibration_apart_from_the_image_calibrates_every_step():
    given = separate()
    with pytest.raises(InputError, match="fully sampled centre"):
        adapted(off(), [one[:2] for one in given], 2)
    found = adapted(off(), given, 6)
    assert found.kept
    assert found.after < found.before
