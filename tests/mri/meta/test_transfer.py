import json
from dataclasses import replace

import pytest
import torch
from command_lines import refused, succeed

from applications.errors import InputError
from applications.mri.evaluation.methods import network_methods
from applications.mri.evaluation.metrics import Convention, Scores
from applications.mri.evaluation.scoring import evaluate
from applications.mri.meta.experiment import adapted
from applications.mri.meta.learning import learn
from applications.mri.meta.losses import TaskLosses
from applications.mri.meta.settings import Ablation, MetaSettings, Rule
from applications.mri.meta.transfer import learned_correlation, measure_transfer, meta_models
from applications.mri.meta.transfer_results import Transfer, TransferSettings
from applications.mri.network.architecture import narrow
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights, named, save_weights
from applications.mri.tasks.task_list import read_task_list
from applications.mri.tasks.tasks import Tasks, open_each, open_tasks
from applications.mri.training.draws import Minibatches

pytestmark = pytest.mark.xdist_group("transfer")  # what its tests share is made once

DEFAULTS = "{size: 24, coils: 2, acceleration: 2, center: 0.25, anatomy: brain_t1_axial}"
LIST = f"""
defaults: {DEFAULTS}
tasks:
  - {{name: head, roles: [train, validation, test]}}
  - {{name: bad, target_noise: 2.0, roles: [train]}}
"""
UNSEEN = f"""
defaults: {DEFAULTS}
tasks:
  - {{name: neck, anatomy: skull_base_t1_axial, roles: [train, test]}}
  - {{name: faster, acceleration: 3, roles: [test]}}
"""
BUDGET = ("--evaluations", 6, "--crop", 0)
TRAINING = MetaSettings(evaluations=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task lists, and what meta-train left of them."""
    folder = tmp_path_factory.mktemp("transfer")
    (folder / "tasks.yaml").write_text(LIST)
    (folder / "unseen.yaml").write_text(UNSEEN)
    network = Network(replace(narrow(2), n_phases=1, filters=2, features=2, self_consistency=2), 1)
    save_weights(folder / "w.safetensors", Trained(network, network.controls(), {}))
    options = ["--tasks", folder / "tasks.yaml", "--init", folder / "w.safetensors"]
    options += ["--out", folder / "meta", "--ablations", "vector,matrix", "--adapt-steps", 1]
    succeed("meta-train", *options, *BUDGET, "--inner-steps", 1, "--outer-rate", 1)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    out = folder / "new" / "out"
    lists = ["--tasks", folder / "tasks.yaml", "--unseen", folder / "unseen.yaml"]
    options = [*lists, "--meta", folder / "meta", "--out", out, "--steps", "0,2", "--slices", 1]
    text = succeed("transfer", *options, *BUDGET)
    return text, out, json.loads((out / "results.json").read_text())


def test_the_task_matrix_is_that_of_models_trained_alone_and_of_those_given(folder, run):
    text, out, found = run
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "results.json", "scans"]
    assert (found["train"], found["seen"], found["unseen"]) == (
        ["head", "bad"],
        ["head"],
        ["neck", "faster"],
    )
    assert list(found["scores"]) == ["head", "bad", "meta, matrix, head", "meta, vector"]
    assert all(list(row) == ["head", "neck", "faster"] for row in found["scores"].values())
    assert "neck*" in text
    # One row of its own and one that was given, again.
    tasks = open_tasks(read_task_list(folder / "tasks.yaml"), out / "scans")
    others = open_each(read_task_list(folder / "unseen.yaml"), out / "scans")
    network, models = meta_models(folder / "meta")
    fresh = Network(network.architecture, 0)
    head = tasks.every[0]
    alone = learn(Ablation.UNIFORM, fresh, fresh.controls(), Tasks((head,)), TRAINING)
    rows = {"head": alone.models["all"], "meta, vector": models["meta, vector"]}
    for name, control in rows.items():
        for task in (head, *others):
            method = network_methods(Trained(fresh, control, {}))["ours"]
            scores = evaluate({"ours": method}, task.parts["test"], task.sampling, 2).mean["ours"]
            assert found["scores"][name][task.name]["psnr"] == pytest.approx(scores.psnr)


def test_curves_are_those_of_adapted_models(folder, run):
    _, out, found = run
    for name, row in found["curves"].items():
        assert list(row) == ["head", "neck"]  # the others have no slices to adapt on
        for task, curve in row.items():
            assert list(curve) == ["0", "2"]
            assert curve["0"]["psnr"] == found["scores"][name][task]["psnr"]
            assert curve["2"]["psnr"] != curve["0"]["psnr"]
    neck, _ = open_each(read_task_list(folder / "unseen.yaml"), out / "scans")
    network, models = meta_models(folder / "meta")
    examples = Minibatches(network, (neck.source("train"),), "train", 1).of_source(0, 0)
    moved = adapted(network, models["meta, vector"], examples, TRAINING, 2)
    method = network_methods(Trained(network, moved, {}))["ours"]
    scores = evaluate({"ours": method}, neck.parts["test"], neck.sampling, 2).mean["ours"]
    assert found["curves"]["meta, vector"]["neck"]["2"]["psnr"] == pytest.approx(scores.psnr)


def test_weights_to_begin_with_are_a_model_of_their_own(folder, tmp_path):
    start = folder / "w.safetensors"
    options = ["--tasks", folder / "tasks.yaml", "--out", tmp_path, "--init", start, "--steps", 0]
    succeed("transfer", *options, *BUDGET)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["scores"]) == ["head", "bad", "before"]
    (head, _) = open_tasks(read_task_list(folder / "tasks.yaml"), tmp_path / "scans").every
    method = network_methods(load_weights(start))["ours"]
    scores = evaluate({"ours": method}, head.parts["test"], head.sampling, 2).mean["ours"]
    assert found["scores"]["before"]["head"]["psnr"] == pytest.approx(scores.psnr)
    assert found["scores"]["head"]["head"]["psnr"] != pytest.approx(scores.psnr)


def test_adaptation_goes_down_the_loss_of_its_slices(folder, run):
    _, out, _ = run
    neck, _ = open_each(read_task_list(folder / "unseen.yaml"), out / "scans")
    trained = load_weights(folder / "w.safetensors")
    examples = Minibatches(trained.network, (neck.source("train"),), "train", 2).of_source(0, 0)
    losses = TaskLosses(trained.network)
    settings = replace(TRAINING, optimizer=Rule.SGD, learning_rate=0.1)
    moved = [
        adapted(trained.network, trained.control, examples, settings, steps) for steps in (0, 1, 4)
    ]
    for x, y in zip(named(moved[0]).values(), named(trained.control).values(), strict=True):
        assert torch.equal(x, y)
    values = [float(losses.of_task(control, examples)) for control in moved]
    assert values[0] > values[1] > values[2]


def test_models_and_correlation_are_those_that_meta_train_wrote(folder):
    _, models = meta_models(folder / "meta")
    assert list(models) == ["meta, matrix, head", "meta, vector"]
    kept = load_weights(folder / "meta" / "weights" / "vector-0-all.safetensors")
    for x, y in zip(
        named(kept.control).values(), named(models["meta, vector"]).values(), strict=True
    ):
        assert torch.equal(x, y)
    results = json.loads((folder / "meta" / "results.json").read_text())
    matrix = next(run for run in results["runs"] if run["ablation"] == "matrix")
    found = learned_correlation(folder / "meta" / "results.json")
    assert found == {name: {"head": matrix["correlation"][name]["head"]} for name in found}


def scores(psnr):
    return Scores(psnr, 0.5, 0.1, Convention.FASTMRI)


def test_gains_curves_and_rank_correlation_are_their_formulas():
    table = {"a": {"t": 3.0}, "b": {"t": 1.0}, "c": {"t": 2.0}, "meta, vector": {"t": 5.0}}
    rows = {name: {t: scores(x) for t, x in row.items()} for name, row in table.items()}
    curves = {"a": {"t": {0: scores(3.0), 1: scores(4.0)}, "u": {0: scores(1.0), 1: scores(2.0)}}}
    learned = {"a": {"t": 0.7}, "b": {"t": 0.2}, "c": {"t": 0.1}}
    settings = TransferSettings(TRAINING, (0, 1))
    found = Transfer(settings, ("a", "b", "c"), ("t",), (), rows, curves, learned)
    assert found.gain("meta, vector", "t") == pytest.approx(3)
    assert found.curve("a", ["t", "u"]) == [2.0, 3.0]
    assert found.agreement() == {"t": pytest.approx(0.5)}  # ranks 3 2 1 against 3 1 2
    equal = {name: {"t": 1 / 3} for name in "abc"}
    assert replace(found, learned=equal).agreement() == {}
    assert replace(found, learned=None).agreement() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0,x", *BUDGET], "--steps must be whole numbers"),
        (["--steps=-1", *BUDGET], "steps must be one or more numbers >= 0"),
        ([], "a training needs a budget"),
        (["--meta", "{}/nowhere", *BUDGET], "weights of meta-train were needed"),
        (["--meta", "{}/half", *BUDGET], "a file of results of meta-train was needed"),
        (["--meta", "{}/meta", "--coils", "2", *BUDGET], "--meta brings its network, got --preset"),
        (["--unseen", "{}/tasks.yaml", *BUDGET], "'head' came twice"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, options, message):
    half = folder / "half" / "weights"
    half.mkdir(parents=True, exist_ok=True)
    source = folder / "meta" / "weights" / "vector-0-all.safetensors"
    (half / source.name).write_bytes(source.read_bytes())
    options = [str(option).format(folder) for option in options]
    lists = ["--tasks", folder / "tasks.yaml", "--out", tmp_path / "out"]
    if "--meta" not in options:
        lists += ["--preset", "tiny", "--coils", 2]
    assert message in refused("transfer", *lists, *options)


def test_uniform_results_have_no_learned_weights(tmp_path):
    content = {"validation": ["a"], "runs": [{"ablation": "uniform", "seed": 0, "correlation": {}}]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="a matrix or a vector, got uniform"):
        learned_correlation(tmp_path / "results.json")


def test_a_transfer_without_steps_or_test_slices_is_refused(folder, run):
    with pytest.raises(InputError, match="steps must be one or more numbers"):
        TransferSettings(TRAINING, ())
    head = open_tasks(read_task_list(folder / "tasks.yaml"), folder / "scans").every[0]
    parts = {role: part for role, part in head.parts.items() if role != "test"}
    begun = load_weights(folder / "w.safetensors")
    with pytest.raises(InputError, match="at least one task with the role test was needed"):
        measure_transfer(
            Tasks((replace(head, parts=parts),)), (), begun, {}, TransferSettings(TRAINING), print
        )
