"""Early stopping: costs against the adjoint's, weights against those of the update they name."""

from dataclasses import replace

import pytest
import torch
from training_cases import BASE, SAMPLING, SIZE, network, same, seeded, trained, write_scans

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import SliceDataset, Volume, write_volume
from applications.mri.network.reconstruction import Loss
from applications.mri.training.examples import draw_full
from applications.mri.training.validation import Look, Looks, Validation, mean_cost
from bilevel import tree


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


def drawn(scans, seed):
    generator = seeded(seed)
    return [draw_full(one, generator, BASE.samplings, flips=False) for one in scans]


def truth(scans, control, seed=1):
    net = network()
    costs = [bl.adjoint(*e.problem(net, Loss()), control).cost for e in drawn(scans, seed)]
    return float(sum(costs)) / len(costs)


def test_the_cost_of_a_look_is_that_of_the_sweeps(scans):
    net = network()
    control = net.controls()
    found = mean_cost(lambda e: e.problem(net, Loss()), drawn(scans, 1), control)
    assert found == pytest.approx(truth(scans, control), rel=1e-6)


def test_looks_see_whole_unflipped_slices_with_the_same_masks(scans):
    for one, example in zip(scans, drawn(scans, 3), strict=True):
        assert example.rows == slice(0, SIZE)
        torch.testing.assert_close(example.reference, one.reference)
    masks = [example.mask for example in drawn(scans, 3)]
    expected = seeded(3)
    for mask in masks:
        torch.randint(1, (), generator=expected)  # which sampling
        assert torch.equal(mask, SAMPLING.mask((SIZE, SIZE), expected))


def test_the_best_weights_are_returned_and_their_cost_is_the_least(scans):
    """At this rate the loss rises again, so that the last weights are not the best."""
    states = []
    settings = replace(
        BASE, steps=9, learning_rate=0.05, validation=Validation(every=3), crop=8, whole=0.0
    )
    copies = {}

    def told(state):
        states.append(state)
        copies[state.step] = tree.map_leaves(lambda x: x if x is None else x.clone(), state.control)

    found = trained(scans, settings, after_step=told, validation=scans)
    assert [look.step for look in found.looks] == [3, 6, 9]
    assert [s.look for s in states if s.look is not None] == list(found.looks)
    for look in found.looks:
        assert look.cost == pytest.approx(truth(scans, copies[look.step]), rel=1e-5)
    best = min(found.looks, key=lambda look: look.cost)
    assert best.step < 9
    assert same(found, replace(states[0], control=copies[best.step]))
    assert same(replace(states[-1], control=states[-1].kept), found)
    assert not found.stopped
    # Looking changes nothing about the training.
    plain = []
    trained(scans, settings, after_step=plain.append)
    assert [state.cost for state in plain] == [state.cost for state in states]


def test_the_last_update_is_looked_at_too(scans):
    settings = replace(BASE, steps=4, validation=Validation(every=3))
    assert [k.step for k in trained(scans, settings, validation=scans).looks] == [3, 4]


def test_validation_scans_of_another_coil_count_are_fitted_to_the_network(scans, tmp_path):
    write_volume(tmp_path / "one.h5", Volume(scans[0].kspace[None, :1]))
    one = SliceDataset([tmp_path / "one.h5"])
    settings = replace(BASE, steps=1, validation=Validation(every=1))
    (look,) = trained(scans, settings, validation=one).looks
    (other,) = trained(scans, settings, validation=scans).looks
    assert 0 < look.cost != other.cost


def test_patience_ends_a_training_that_does_not_improve(scans):
    """The looks of the whole training say where patience must end it."""
    settings = replace(BASE, steps=16, learning_rate=0.1, validation=Validation(every=2))
    whole = trained(scans, settings, validation=scans)
    costs = [look.cost for look in whole.looks]
    ends = next(k for k in range(2, 8) if min(costs[k - 1 : k + 1]) >= min(costs[: k - 1]))
    assert ends < 7  # it would have gone on
    patient = replace(settings, validation=Validation(every=2, patience=2))
    found = trained(scans, patient, validation=scans)
    assert found.stopped
    assert len(found.looks) == ends + 1
    assert found.costs == whole.costs[: 2 * (ends + 1)]
    assert found.looks == whole.looks[: ends + 1]
    reached = min(range(ends + 1), key=costs.__getitem__)
    assert ends - reached == 2


def looked(*costs):
    found = Looks()
    for step, cost in enumerate(costs, 1):
        found = found.after(Look(step, cost), bl.PerStep([], {"step": step}))
    return found


@pytest.mark.parametrize(
    ("costs", "best", "exhausted"),
    [
        ((), None, False),
        ((3.0,), 1, False),
        ((3.0, 3.0), 1, False),  # as good as before is no gain
        ((3.0, 2.0, 2.5), 2, False),
        ((3.0, 2.0, 2.5, 2.0), 2, True),
        ((3.0, 4.0, 2.0), 3, False),
    ],
)
def test_looks_keep_the_earliest_best_and_count_from_there(costs, best, exhausted):
    found = looked(*costs)
    assert (found.best and found.best.initial["step"]) == best
    assert found.exhausted(2) == exhausted
    assert not found.exhausted(None)


def test_settings_out_of_range_and_patience_without_slices_are_refused(scans):
    with pytest.raises(InputError, match=r"every must be at least 1 update, got 0"):
        Validation(0)
    with pytest.raises(InputError, match=r"patience must be at least 1 look, or None .*, got 0"):
        Validation(patience=0)
    settings = replace(BASE, validation=Validation(patience=2))
    with pytest.raises(InputError, match=r"patience of 2 looks needs validation slices, got none"):
        trained(scans, settings)


def test_validation_scans_that_do_not_fit_are_refused_before_anything_is_trained(scans, tmp_path):
    mask = SAMPLING.mask((SIZE, SIZE), seeded())[0]
    write_volume(tmp_path / "part.h5", Volume(scans[0].kspace[None] * mask, mask=mask))
    with pytest.raises(InputError, match=r"part.h5: fully sampled k-space was needed"):
        trained(
            scans,
            BASE,
            after_step=lambda state: pytest.fail("trained"),
            validation=SliceDataset([tmp_path / "part.h5"]),
        )
