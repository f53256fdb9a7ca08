"""An interrupted training that goes on is, bit by bit, the one that was not interrupted."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from training_cases import BASE, network, same, trained, write_scans

from applications.errors import InputError
from applications.mri.data import SliceDataset
from applications.mri.network.architecture import narrow
from applications.mri.network.weights import load_weights
from applications.mri.training.keeping import Keeper
from applications.mri.training.resuming import StateFile
from applications.mri.training.training import train
from applications.mri.training.validation import Validation
from applications.records import describe

SETTINGS = replace(BASE, steps=6, crop=8, whole=0.3, validation=Validation(every=2))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


class PowerCutError(Exception):
    """Ends a training at once."""


def state_file(path, net, settings, **changes):
    return StateFile(path, net, describe(settings) | {"data": [["a.h5", 2]]} | changes)


def interrupted(scans, settings, net, path, *at, looked_at=None):
    """The snapshots read back from files after some updates; the training fails at the last."""
    file, snapshots = state_file(path, net, settings), []

    def save(state):
        if state.step in at:
            file.save(state.snapshot())
            snapshots.append(state_file(path, net, settings).load())
        if state.step == max(at):
            raise PowerCutError

    with pytest.raises(PowerCutError):
        trained(scans, settings, net, after_step=save, validation=looked_at)
    return snapshots


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_goes_on_is_bitwise_the_one_without_interruption(
    scans, tmp_path, accumulate
):
    """Within a round of slices, at a look and between looks, before and after crops end."""
    settings, net = replace(SETTINGS, accumulate=accumulate), network()
    few = SliceDataset([scans.files[0].path])
    whole = trained(scans, settings, net, validation=few)
    at = (3, 4) if accumulate == 1 else (5,)
    for snapshot in interrupted(scans, settings, net, tmp_path / "state", *at, looked_at=few):
        found = train(net, snapshot, scans, settings, validation=few)
        assert found.costs == whole.costs
        assert found.looks == whole.looks
        assert same(found, whole)
        assert found.seconds > snapshot.seconds


def test_complex_weights_and_their_moments_survive_the_file(scans, tmp_path):
    net, settings, path = network(narrow), replace(SETTINGS, steps=3), tmp_path / "state"
    kept = []

    def save(state):
        kept.append(state.snapshot())

    trained(scans, settings, net, after_step=save)
    file = state_file(path, net, settings)
    file.save(kept[1])
    found = file.load()
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert same(found, kept[1])
    assert found.moments.keys() == kept[1].moments.keys()
    assert any(m["exp_avg"].is_complex() for m in found.moments.values())
    for index, moments in found.moments.items():
        for name, value in moments.items():
            assert value.dtype == kept[1].moments[index][name].dtype
            assert torch.equal(value, kept[1].moments[index][name])
    assert (found.costs, found.seconds) == (kept[1].costs, kept[1].seconds)
    assert found.place.remaining == kept[1].place.remaining
    assert torch.equal(found.place.generator, kept[1].place.generator)
    assert not same(kept[0], kept[1])  # a snapshot is a copy


def test_a_longer_training_goes_on_and_a_finished_one_is_over(scans, tmp_path):
    net, settings = network(), replace(SETTINGS, validation=Validation())
    (snapshot,) = interrupted(scans, settings, net, tmp_path / "state", 3)
    longer = train(net, snapshot, scans, replace(settings, steps=9))
    assert len(longer.costs) == 9
    assert longer.costs[:3] == list(snapshot.costs)
    again = train(net, snapshot, scans, replace(settings, steps=9))  # the snapshot is as it was
    assert again.costs == longer.costs
    over = train(net, snapshot, scans, replace(settings, steps=3))
    assert over.costs == list(snapshot.costs)
    assert same(over, snapshot)


def test_time_that_was_spent_is_carried_over(scans, tmp_path):
    net, settings = network(), replace(BASE, steps=None, seconds=1000.0)
    (snapshot,) = interrupted(scans, settings, net, tmp_path / "state", 2)
    assert 0 < snapshot.seconds < 100
    shares = []
    late = replace(snapshot, seconds=999.9)
    found = train(net, late, scans, settings, lambda state: shares.append(state.share))
    assert shares[0] > 0.9998
    assert 1000 <= found.seconds < 1100
    over = train(net, replace(snapshot, seconds=1000.0), scans, settings)
    assert over.costs == list(snapshot.costs)


def test_the_keeper_writes_the_best_weights_and_a_state_that_goes_on(scans, tmp_path, monkeypatch):
    monkeypatch.setattr("applications.mri.training.keeping._SAVE_EVERY", -1.0)
    settings = replace(SETTINGS, learning_rate=0.05)
    net, path, present = network(), tmp_path / "w", {}
    file = state_file(tmp_path / "w.state", net, settings)
    keeper = Keeper(path, net, {}, lambda stage, share: None, file)

    def told(state):
        keeper(state)
        present.update(state=state, best=state.kept)
        if state.step == 5:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        trained(scans, settings, net, after_step=told, validation=scans)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w", "w.state"]
    assert same(load_weights(path), replace(present["state"], control=present["best"]))
    whole = trained(scans, settings, net, validation=scans)
    found = train(net, file.load(), scans, settings, validation=scans)
    assert same(found, whole)
    keeper.finish(found.control)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert same(load_weights(path), whole)


def test_other_conditions_are_listed_and_refused(scans, tmp_path):
    net, path = network(), tmp_path / "state"
    interrupted(scans, SETTINGS, net, path, 1)
    state_file(path, net, replace(SETTINGS, steps=9, seconds=5.0)).load()  # these may differ
    other = replace(SETTINGS, seed=3, learning_rate=0.5)
    message = (
        r"state: a training goes on under the same conditions only: learning_rate was 0.003, is "
        r"0.5; seed was 0, is 3. Restore them, or train without --resume"
    )
    with pytest.raises(InputError, match=message):
        state_file(path, net, other).load()
    with pytest.raises(InputError, match=r"data was \[\['a.h5', 2\]\], is \[\['b.h5', 9\]\]"):
        state_file(path, net, SETTINGS, data=[("b.h5", 9)]).load()
    with pytest.raises(InputError, match=r"same architecture only: .*filters was 3, is 16"):
        state_file(path, type(net)(narrow(2)), SETTINGS).load()


def test_a_missing_or_damaged_state_is_refused_and_a_failed_one_replaces_nothing(
    scans, tmp_path, monkeypatch
):
    net, path = network(), tmp_path / "state"
    file = state_file(path, net, SETTINGS)
    with pytest.raises(InputError, match=r"state: the state of an interrupted training .* none"):
        file.load()
    (snapshot,) = interrupted(scans, SETTINGS, net, path, 1)
    content = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(InputError, match=r"cannot be written .*no space left"):
            file.save(snapshot)
    assert path.read_bytes() == content
    with safe_open(path, framework="pt") as opened:
        assert json.loads(opened.metadata()["training"])["costs"] == list(snapshot.costs)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"state: a complete training state was needed"):
        file.load()
