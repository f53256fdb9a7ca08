"""What the options of `train` lead to: settings, files, and messages."""

import shutil
import signal

import pytest
import torch
from command_lines import call, refused, succeed
from training_cases import SIZE, same, seeded, simulated, write_scans

import bilevel as bl
from applications.mri.data import Volume, write_volume
from applications.mri.network.architecture import Architecture
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights, save_weights
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.training.schedules import Constant, Cosine, Step
from applications.mri.training.self_supervised import SelfSupervision
from applications.mri.training.training import TrainingResult, train
from applications.mri.training.validation import Validation

MASK = ["--acceleration", 2, "--center", 0.25]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_scans(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Weights of a network that trains quickly."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    architecture = Architecture(2, n_phases=1, filters=2, features=2, feature_kernel=3)
    network = Network(architecture, 1)
    save_weights(path, Trained(network, network.controls(), {}))
    return path


@pytest.fixture
def asked(monkeypatch, data, tmp_path):
    """What `train` is called with."""

    def settings_of(*options):
        seen = []

        def probe(network, begin, slices, settings, after_step, validation, keep):
            seen.append((settings, validation))
            return TrainingResult(begin, [1.0], 0.0)

        with monkeypatch.context() as patch:
            patch.setattr("applications.mri.commands.train.train", probe)
            succeed("train", "--data", data, "--out", tmp_path / "w", *options)
        return seen[0]

    return settings_of


def test_options_are_settings(asked, data):
    plain, looked_at = asked()
    assert looked_at is None
    assert (plain.accumulate, plain.schedule, plain.validation) == (1, Cosine(), Validation())
    assert (plain.device, plain.precision, plain.self_supervision) == ("cpu", "float32", None)
    assert plain.checkpointing == bl.Checkpointing()
    settings, looked_at = asked(
        *("--accumulate", 3, "--schedule", "step", "--validation", data, "--validate-every", 7),
        *("--patience", 2, "--budget", "500 MiB"),
    )
    assert (settings.accumulate, settings.schedule) == (3, Step())
    assert settings.validation == Validation(7, 2)
    assert settings.checkpointing == bl.Budget("500 MiB")
    assert len(looked_at) == 4
    assert asked("--schedule", "constant")[0].schedule == Constant()
    assert asked("--self-supervised")[0].self_supervision == SelfSupervision()
    narrow = asked("--self-supervised", "--calibration", 8)[0]
    assert narrow.self_supervision == SelfSupervision(centre=8)
    assert asked("--validation", data)[0].validation == Validation()


def test_a_training_that_was_interrupted_goes_on_to_the_same_files(
    data, small, tmp_path, monkeypatch
):
    options = ["--init", small, *MASK, "--steps", 5, "--seed", 3, "--validation", data]
    options = ["train", "--data", data, *options, "--validate-every", 2]
    text = succeed(*options, "--out", tmp_path / "whole")
    assert "5 updates" in text

    def failing(network, begin, slices, settings, after_step, *rest):
        def stop(state):
            if state.step == number:
                signal.raise_signal(signals.pop())
            after_step(state)

        return train(network, begin, slices, settings, stop, *rest)

    signals, out = [signal.SIGTERM, signal.SIGINT], tmp_path / "w"
    with monkeypatch.context() as patch:
        patch.setattr("applications.mri.commands.train.train", failing)
        number = 3
        assert call(*options, "--out", out).exit_code == 130
        assert "state there; go on with it by --resume, or" in refused(*options, "--out", out)
        number = 4
        assert call(*options, "--out", out, "--resume").exit_code == 143
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w", "w.state", "whole"]
    found = refused(*options, "--out", tmp_path / "w", "--resume", "--accumulate", 2)
    assert "same settings only: accumulate was 1, is 2" in found
    text = succeed(*options, "--out", tmp_path / "w", "--resume")
    assert "5 updates" in text
    assert "Least validation loss" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w", "whole"]
    found, whole = load_weights(tmp_path / "w"), load_weights(tmp_path / "whole")
    assert same(found, whole)
    assert found.record == whole.record
    assert not same(found, load_weights(small))


def test_undersampled_scans_are_trained_on_alone(small, tmp_path):
    (tmp_path / "data").mkdir()
    kspace = torch.stack([one.kspace for one in simulated(2)])
    mask = PoissonDisc(2, 8).mask((SIZE, SIZE), seeded())
    write_volume(tmp_path / "data" / "a.h5", Volume(kspace * mask, mask=mask))
    options = ["--data", tmp_path / "data", "--out", tmp_path / "w", "--init", small]
    assert "fully sampled k-space was needed" in refused("train", *options, "--steps", 1)
    found = refused("train", *options, "--steps", 1, "--self-supervised")
    assert "outside the central 24 x 24 were needed, the mask has 0; take a smaller" in found
    text = succeed("train", *options, "--steps", 1, "--self-supervised", "--calibration", 8)
    assert "1 updates" in text
    assert "SelfSupervision" in load_weights(tmp_path / "w").record["self_supervision"]


def test_tensorboard_gets_its_files(data, small, tmp_path):
    pytest.importorskip("tensorboard")
    options = ["--data", data, "--out", tmp_path / "w", "--init", small, *MASK, "--steps", 1]
    succeed("train", *options, "--tensorboard", tmp_path / "board")
    assert [p.name.split(".")[0] for p in (tmp_path / "board").iterdir()] == ["events"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedule", "linear"], "schedule must be one of cosine, constant, step, got 'linear'"),
        (["--patience", 3], "need scans to look at, got no --validation; name a folder of them"),
        (["--validate-every", 3], "need scans to look at, got no --validation"),
        (["--budget", "some"], "a budget is a number of bytes, or text with one of the units"),
        (["--device", "tpu"], "device must be 'cpu' or 'cuda', got 'tpu'"),
        (["--precision", "bfloat16"], "precision 'bfloat16' needs a GPU, device is 'cpu'"),
        (["--self-supervised", "--mask", "poisson"], "takes the mask of each scan, got options of"),
        (["--self-supervised", "--center", 0.1], "leave --mask and its settings out, except"),
    ],
)
def test_options_that_do_not_fit_are_one_line(data, tmp_path, options, message):
    found = refused("train", "--data", data, "--out", tmp_path / "w", "--steps", 1, *options)
    assert message in found
    assert list(tmp_path.iterdir()) == []


def test_tasks_bring_scans_masks_and_validation(data, small, tmp_path, monkeypatch):
    seen = []

    def probe(network, begin, slices, settings, after_step, validation, keep):
        seen.append((slices, validation))
        return train(network, begin, slices, settings, after_step, validation, keep)

    monkeypatch.setattr("applications.mri.commands.train.train", probe)
    for role in ("train", "validation"):
        shutil.copytree(data, tmp_path / "scans" / role)
    listed = tmp_path / "tasks.yaml"
    listed.write_text(
        "defaults: {scans: scans, acceleration: 2, center: 0.25}\n"
        "tasks: [{name: columns, roles: [train, validation]}]\n"
    )
    point = f"name=points,scans={tmp_path / 'scans'},mask=poisson,acceleration=2,calibration=6"
    out = tmp_path / "w"
    point = f"{point},roles=train,target_noise=0.5"
    options = ["--tasks", listed, "--task", point, "--init", small]
    text = succeed("train", "--out", out, *options, "--steps", 2, "--validate-every", 2)
    (columns, points), (looked_at,) = seen[0]
    assert columns.samplings == looked_at.samplings == (CartesianRandom(2.0, 0.25),)
    assert points.samplings == (PoissonDisc(2.0, 6),)
    assert len(columns.slices) == len(points.slices) == len(looked_at.slices) == 4
    assert "Least validation loss" in text
    assert columns.noise is looked_at.noise is None
    assert points.noise.level == 0.5
    record = load_weights(out).record
    assert record["target noise"] == {"columns": 0.0, "points": 0.5}
    assert record["samplings"] == {
        "columns": "CartesianRandom(acceleration=2.0, center_fraction=0.25)",
        "points": repr(points.samplings[0]),
    }
    succeed("train", "--out", out, *options, "--steps", 1)
    assert seen[1][1] is None  # validation only where it is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "scans of a folder or of tasks were needed, got neither; give --data FOLDER, or"),
        (["--data", "x", "--task", "name=a,anatomy=b"], "of a folder or of tasks were needed, got"),
        (
            ["--task", "name=a,anatomy=skull_base_t1_axial", "--mask", "poisson"],
            "leave --mask, its",
        ),
        (["--task", "name=a,anatomy=skull_base_t1_axial", "--validation", "x"], "and --validation"),
        (
            ["--task", "name=a,anatomy=skull_base_t1_axial,size=32,roles=test"],
            "at least one task with the role train was needed, none of 1 has it",
        ),
    ],
)
def test_scans_come_from_a_folder_or_from_tasks(tmp_path, options, message):
    assert message in refused("train", "--out", tmp_path / "w", *options)
    assert not (tmp_path / "w").exists()
