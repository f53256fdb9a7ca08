import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_score, recall_score
from typer.testing import CliRunner

from applications.errors import InputError
from applications.settings import Method
from applications.toy.cleaning import CleaningSettings, Sizes, judge
from applications.toy.cli import app
from applications.toy.data import Convention, load
from applications.toy.hyper_cleaning import run_hyper_cleaning
from applications.toy.models import Model, accuracy, fit, logits, losses, penalty, start

pytestmark = pytest.mark.xdist_group("hyper_cleaning")  # what its tests share is made once

SMALL = CleaningSettings(
    sizes=Sizes(200, 60, 500),
    updates=12,
    every=6,
    rate=0.4,
    decays=(5e-3,),
    hidden=20,
    fit_steps=40,
)
QUICK = replace(SMALL, sizes=Sizes(80, 40, 100), updates=2, every=1, fit_steps=8)


def run(settings):
    return run_hyper_cleaning(settings, lambda stage, share: None)


@pytest.fixture(scope="module")
def linear():
    return run(SMALL)


@pytest.fixture(scope="module")
def quick():
    return run(QUICK)


def test_a_linear_model_is_fitted_as_scikit_learn_does():
    data = load()[:100]
    weights = torch.rand(100, generator=torch.Generator().manual_seed(0))
    begin = start(Model.LINEAR, 64, 10, 0, torch.Generator())
    found = fit(begin, data.inputs, data.labels, weights, 0.03, 200)
    # scikit-learn minimises C sum_i w_i l_i + |W|^2 / 2; ours is that times decay.
    theirs = LogisticRegression(C=1 / (0.03 * float(weights.sum())), tol=1e-6, max_iter=500)
    theirs.fit(data.inputs.numpy(), data.labels.numpy(), weights.numpy())
    np.testing.assert_allclose(found["weight"].numpy(), theirs.coef_, atol=2e-3)
    ours = accuracy(found, data.inputs, data.labels)
    assert ours == pytest.approx(theirs.score(data.inputs.numpy(), data.labels.numpy()), abs=0.01)


def test_samples_of_weight_zero_do_not_count():
    data = load()[:60]
    weights = torch.arange(60).lt(40).float()
    begin = start(Model.MLP, 64, 10, 8, torch.Generator().manual_seed(0))
    some = fit(begin, data.inputs, data.labels, weights, 0.01, 20)
    fewer = fit(begin, data.inputs[:40], data.labels[:40], torch.ones(40), 0.01, 20)
    torch.testing.assert_close(some, fewer)


def test_the_network_has_one_hidden_layer_and_its_biases_do_not_decay():
    params = start(Model.MLP, 3, 2, 4, torch.Generator().manual_seed(0))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    hidden = (x @ params["hidden weight"].T + params["hidden bias"]).clamp(min=0)
    expected = hidden @ params["weight"].T + params["bias"]
    torch.testing.assert_close(logits(params, x), expected)
    squares = params["weight"].square().sum() + params["hidden weight"].square().sum()
    moved = {**params, "bias": params["bias"] + 1}
    torch.testing.assert_close(penalty(moved, 0.5), 0.25 * squares)
    each = losses(params, x, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(each, -expected.log_softmax(1)[:, 0])


def test_verdicts_are_scored_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, generator=generator)
    wrong = torch.rand(200, generator=generator) < 0.4
    found, judged = judge(weights, wrong), weights < 0.5
    assert found.f1 == pytest.approx(f1_score(wrong, judged))
    assert found.precision == pytest.approx(precision_score(wrong, judged))
    assert found.recall == pytest.approx(recall_score(wrong, judged))
    assert found.wrong_mass == pytest.approx(float(weights[wrong].sum() / weights.sum()))


def test_verdicts_on_nothing_are_perfect():
    found = judge(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert (found.f1, found.precision, found.recall, found.wrong_mass) == (1, 1, 1, 0)


def test_cleaning_finds_wrong_labels_and_beats_validation_data_alone(linear):
    (one,) = linear.runs
    assert one.cleaning.f1 > 0.85
    assert one.cleaning.wrong_mass < 0.2 < float(one.wrong.double().mean())
    assert one.values[-1] < 0.8 * one.values[0]
    order = ["noisy only", "noisy and validation", "learned weights"]
    assert [one.accuracies[way] for way in order] == sorted(one.accuracies[way] for way in order)
    assert one.accuracies["learned weights"] > one.accuracies["validation only"]


def test_the_same_seed_gives_the_same_result(quick):
    again = run(QUICK)
    assert torch.equal(again.runs[0].weights, quick.runs[0].weights)
    assert again.runs[0].accuracies == quick.runs[0].accuracies


def test_several_seeds_are_the_runs_of_each(quick):
    both = run(replace(QUICK, seeds=2))
    single = run(replace(QUICK, seed=1))
    assert torch.equal(both.runs[0].weights, quick.runs[0].weights)
    assert torch.equal(both.runs[1].weights, single.runs[0].weights)
    assert not torch.equal(both.runs[1].wrong, quick.runs[0].wrong)
    found = both.as_json()["summary"]["oracle"]
    values = [r.accuracies["oracle"] for r in both.runs]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-7)


@pytest.mark.parametrize(
    "change",
    [
        {"model": Model.MLP},
        {"share": 0.3},
        {"convention": Convention.EXACT},
        {"method": Method.MLM},
        {"updates": 1},
        {"rate": 0.1},
        {"inner_steps": 3},
        {"learning_decay": 0.1},
        {"folds": 3},
        {"krylov_steps": 1},
        {"damping": 0.5},
        {"fit_steps": 2},
    ],
    ids=str,
)
def test_every_setting_matters(change, quick):
    after = run(replace(QUICK, **change)).runs[0]
    assert not torch.equal(quick.runs[0].weights, after.weights)


def test_corruption_by_each_convention_leaves_the_share_that_it_says(linear):
    exact = run(replace(QUICK, updates=1, convention=Convention.EXACT)).as_json()
    assert exact["runs"][0]["wrong_share"] == 0.5
    assert 0.35 < linear.as_json()["runs"][0]["wrong_share"] < 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": 0},
        {"updates": 0},
        {"rate": 0.0},
        {"decays": ()},
        {"decays": (-1.0,)},
        {"folds": 1},
        {"krylov_steps": 0},
        {"damping": -1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match=f"{next(iter(change))} must be .* got"):
        CleaningSettings(**change)


def test_too_few_samples_are_refused():
    with pytest.raises(
        InputError, match=r"3 validation samples were needed, one a fold and one .* got 2"
    ):
        run(replace(SMALL, sizes=Sizes(20, 2, 20)))


def test_the_part_that_a_folder_sets_aside_is_what_is_tested_on(tmp_path):
    digits = load()
    write_idx(tmp_path, "train", digits[:300])
    write_idx(tmp_path, "t10k", digits[300:500])
    settings = replace(QUICK, data=tmp_path, sizes=Sizes(200, 60, 200))
    tested = run(settings).runs[0].accuracies
    # With other images for tests the models are the same, and no test image is one of theirs.
    write_idx(tmp_path, "t10k", replace(digits[300:500], labels=(digits.labels[300:500] + 1) % 10))
    others = run(settings).runs[0]
    assert others.decays == run(settings).runs[0].decays
    assert tested["oracle"] > 0.7
    assert others.accuracies["oracle"] < 0.1


def write_idx(folder, part, data):
    images = (data.inputs.reshape(-1, 8, 8) * 255).to(torch.uint8).numpy()
    for values, ending in ((images, "images-idx3-ubyte"), (data.labels, "labels-idx1-ubyte")):
        values = np.asarray(values, np.uint8)
        shape = struct.pack(f">{values.ndim}I", *values.shape)
        path = folder / f"{part}-{ending}"
        path.write_bytes(bytes([0, 0, 8, values.ndim]) + shape + values.tobytes())


def call(*arguments):
    return CliRunner().invoke(app, ["hyper-cleaning", *map(str, arguments)])


def test_the_command_writes_results_and_a_figure(tmp_path: Path):
    sizes = ["--train", 40, "--validation", 40, "--test", 40]
    found = call("--out", tmp_path / "new", *sizes, "--updates", 1, "--seed", 3)
    assert found.exit_code == 0, found.output
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["settings"]["sizes"] == [40, 40, 40]
    assert written["settings"]["model"] == "linear"
    assert [r["seed"] for r in written["runs"]] == [3]
    assert all(math.isfinite(x["mean"]) for x in written["summary"].values())
    assert f"{100 * written['summary']['oracle']['mean']:.2f}" in found.stdout
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 2
    again = call("--out", tmp_path / "new", *sizes, "--updates", 1, "--seed", 4)
    assert again.exit_code == 0, again.output


def test_the_command_says_in_one_line_what_does_not_fit(tmp_path: Path):
    found = call("--out", tmp_path, "--train", 5000)
    assert found.exit_code == 2
    assert found.stderr == (
        "error: digits: 5000 + 400 + 797 = 6197 samples were needed, there are 1797; "
        "ask for fewer.\n"
    )


@pytest.mark.parametrize("command", ["hyper-cleaning", "task-weights"])
def test_the_commands_replace_no_files_of_another_kind(command: str, tmp_path: Path):
    mine = b'{"settings": {}, "runs": [1, 2]}', b"\x89PNG\r\n\x1a\n tEXtSoftware\0Matplotlib"
    for name, written in zip(("results.json", "figure.png"), mine, strict=True):
        (tmp_path / name).write_bytes(written)
        found = CliRunner().invoke(app, [command, "--out", str(tmp_path)])
        assert found.exit_code == 2
        assert f"{tmp_path / name}: a file lies there that is not" in found.stderr
        assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(name, written)]
        (tmp_path / name).unlink()
