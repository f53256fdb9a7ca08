import sys

import pytest

pytest.importorskip("tensorboard")

from dataclasses import replace

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import BASE, trained, write_scans

from applications.errors import InputError
from applications.mri.training.keeping import tensorboard
from applications.mri.training.validation import Validation


def test_what_is_written_is_the_history_of_the_training(tmp_path):
    scans, rates = write_scans(tmp_path), []
    settings = replace(BASE, validation=Validation(every=3))
    with tensorboard(tmp_path / "new" / "board") as board:

        def told(state):
            rates.append(state.rate)
            board(state)

        found = trained(scans, settings, after_step=told, validation=scans)
    events = EventAccumulator(str(tmp_path / "new" / "board"))
    events.Reload()

    def read(name):
        return {event.step: event.value for event in events.Scalars(name)}

    expected = {
        "loss/training": dict(enumerate(found.costs, 1)),
        "learning_rate": dict(enumerate(rates, 1)),
        "loss/validation": {look.step: look.cost for look in found.looks},
    }
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for name, values in expected.items():
        assert read(name) == pytest.approx(values, rel=1e-6)  # float32


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = r"TensorBoard was needed to write to .*pip install \"bilevel\[tensorboard\]\", or le"
    with pytest.raises(InputError, match=message), tensorboard(tmp_path / "board"):
        pytest.fail("went on")
    assert list(tmp_path.iterdir()) == []
