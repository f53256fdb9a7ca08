"""An interrupted training that goes on is, bit by bit, the one that was not interrupted."""

from dataclasses import replace

import pytest
import torch
from fuses import PowerCutError
from training_cases import BASE, network, same, trained, write_scans

import bilevel as bl
from applications.mri.data import SliceDataset
from applications.mri.network.architecture import narrow
from applications.mri.network.weights import load_weights
from applications.mri.training.keeping import Keeper
from applications.mri.training.validation import Validation
from applications.records import describe
from bilevel.errors import ArgumentError

SETTINGS = replace(BASE, steps=6, crop=8, whole=0.3, validation=Validation(every=2))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


def keep(folder, settings=SETTINGS):
    told = {n: v for n, v in describe(settings).items() if n not in ("steps", "seconds")}
    return bl.Keep(folder, every=1, conditions=told)


def cut_off(scans, settings, net, folder, at, looked_at=None):
    """A training that ends in the middle of an update; the one before was kept."""

    def stop(state):
        if state.step == at:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        trained(
            scans, settings, net, after_step=stop, validation=looked_at, keep=keep(folder, settings)
        )


@pytest.fixture(scope="module")
def few(scans):
    return SliceDataset([scans.files[0].path])


@pytest.fixture(scope="module")
def uncut(request, scans, few):
    """Settings, and the training by them without an interruption."""
    settings = replace(SETTINGS, accumulate=request.param)
    return settings, trained(scans, settings, network(), validation=few)


@pytest.mark.parametrize(("uncut", "at"), [(1, 4), (1, 5), (2, 6)], indirect=["uncut"])
def test_a_training_that_goes_on_is_bitwise_the_one_without_interruption(
    scans, few, uncut, tmp_path, at
):
    """Within a round of slices, at a look and between looks, before and after crops end."""
    (settings, whole), net = uncut, network()
    cut_off(scans, settings, net, tmp_path, at, few)
    found = trained(scans, settings, net, validation=few, keep=keep(tmp_path, settings))
    assert found.costs == whole.costs
    assert found.looks == whole.looks
    assert same(found, whole)


def test_complex_weights_go_on_too_and_a_longer_training(scans, tmp_path):
    net, settings = network(narrow), replace(SETTINGS, steps=3, validation=Validation())
    cut_off(scans, settings, net, tmp_path, 3)
    longer = replace(settings, steps=5)
    found = trained(scans, longer, net, keep=keep(tmp_path, longer))
    assert any(x.is_complex() for x in bl.tree.leaves_of(found.control) if x is not None)
    assert len(found.costs) == 5
    over = trained(scans, longer, net, keep=keep(tmp_path, longer))
    assert over.costs == found.costs
    assert same(over, found)
    with pytest.raises(ArgumentError, match="kept after 5 updates, steps is 3"):
        trained(scans, settings, net, keep=keep(tmp_path, settings))


def test_time_that_was_spent_is_carried_over(scans, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    net, settings = network(), replace(BASE, steps=None, seconds=1000.0)
    shares = []

    def slow(state):
        clock[0] += 300
        shares.append(state.share)
        if len(shares) == 3:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        trained(scans, settings, net, after_step=slow, keep=keep(tmp_path, settings))
    clock[0] = 5e6
    found = trained(scans, settings, net, after_step=slow, keep=keep(tmp_path, settings))
    # Two updates were kept, after 600 s; the share is taken before 300 s more pass.
    assert shares == pytest.approx([0, 0.3, 0.6, 0.6, 0.9, 1])
    assert len(found.costs) == 5
    assert found.seconds == pytest.approx(1500)


def test_the_keeper_writes_the_best_weights(scans, tmp_path, monkeypatch):
    monkeypatch.setattr("applications.mri.training.keeping._SAVE_EVERY", -1.0)
    settings = replace(SETTINGS, learning_rate=0.05)
    net, path, present = network(), tmp_path / "w", {}
    keeper = Keeper(path, net, {}, lambda stage, share: None)

    def told(state):
        keeper(state)
        present.update(state=state, best=state.kept)
        if state.step == 5:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        trained(scans, settings, net, after_step=told, validation=scans)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert same(load_weights(path), replace(present["state"], control=present["best"]))


def test_other_conditions_are_listed_and_refused(scans, tmp_path):
    net = network()
    cut_off(scans, SETTINGS, net, tmp_path, 3)
    other = replace(SETTINGS, seed=3, learning_rate=0.5)
    message = r"learning_rate was 0.003, is 0.5; .*seed was 0, is 3.* Restore them"
    with pytest.raises(ArgumentError, match=message):
        trained(scans, other, net, keep=keep(tmp_path, other))


def test_what_is_read_back_has_memory_of_its_own(scans, tmp_path):
    net, kept = network(), []
    cut_off(scans, SETTINGS, net, tmp_path, 3)

    def told(state):
        kept.append(
            torch.cat([x.flatten() for x in bl.tree.leaves_of(state.control) if x is not None])
        )

    trained(scans, SETTINGS, net, after_step=told, keep=keep(tmp_path))
    assert not torch.equal(kept[0], kept[-1])
