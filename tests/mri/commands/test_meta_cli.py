import json
from dataclasses import replace

import pytest
import torch
from command_lines import call, refused, succeed

import bilevel as bl
from applications.mri.evaluation.baselines import zero_filled
from applications.mri.evaluation.methods import network_methods
from applications.mri.evaluation.scoring import evaluate
from applications.mri.meta.learning import learn
from applications.mri.meta.settings import Ablation, MetaSettings
from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights, named, save_weights
from applications.mri.tasks.task_list import read_task_list
from applications.mri.tasks.tasks import open_tasks
from applications.settings import Method

pytestmark = pytest.mark.xdist_group("meta_cli")  # what its tests share is made once

LIST = """
defaults: {size: 24, coils: 2, acceleration: 2, center: 0.25, anatomy: brain_t1_axial}
tasks:
  - {name: head, roles: [train, validation, test]}
  - {name: wide, coils: 4, roles: [train]}
  - {name: unseen, acceleration: 3, roles: [test]}
"""
BUDGET = ("--evaluations", 4, "--inner-steps", 1, "--crop", 0, "--keep-graphs")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    (folder / "tasks.yaml").write_text(LIST)
    network = Network(replace(paper(3), n_phases=1, filters=2, features=2, feature_kernel=3), 1)
    save_weights(folder / "w.safetensors", Trained(network, network.controls(), {}))
    return folder


@pytest.fixture(scope="module")
def run(files):
    """Output, folder and results of one run of everything."""
    out = files / "new" / "out"
    options = ["--tasks", files / "tasks.yaml", "--init", files / "w.safetensors", "--out", out]
    text = succeed("meta-train", *options, *BUDGET, "--seeds", 2, "--adapt-steps", 1)
    return text, out, json.loads((out / "results.json").read_text())


def test_every_way_is_trained_for_every_seed_and_its_weights_are_kept(run):
    text, out, found = run
    ways = [(one["ablation"], one["seed"]) for one in found["runs"]]
    assert ways == [(way, seed) for way in Ablation for seed in (0, 1)]
    assert sorted(path.name for path in out.iterdir()) == [
        *("figure.png", "results.json", "scans", "weights")
    ]
    kept = {path.name for path in (out / "weights").iterdir()}
    assert {"uniform-0-all.safetensors", "matrix-1-head.safetensors"} <= kept
    assert {"vector-0-adapted-wide.safetensors", "matrix-1-adapted-head.safetensors"} <= kept
    for way in Ablation:
        assert way in text
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_coils_and_sizes_are_reported(run):
    text, _, found = run
    assert "head: CartesianRandom(acceleration=2.0, center_fraction=0.25)" in text
    assert "2 coils padded with zeros to 3" in text
    assert "4 coils compressed to 3" in text
    (wide,) = [one for one in found["tasks"] if one["name"] == "wide"]
    assert (wide["coils"][0]["came"], wide["coils"][0]["needed"]) == (4, 3)
    assert 0.5 < wide["coils"][0]["energy_kept"] < 1
    assert wide["sizes"][0]["matrix"] == [24, 24]


def test_results_are_those_of_the_training(run, files):
    _, out, found = run
    tasks = open_tasks(read_task_list(files / "tasks.yaml"), out / "scans")
    begun = load_weights(files / "w.safetensors")
    settings = MetaSettings(
        evaluations=4, inner_steps=1, checkpointing=bl.Checkpointing(block=None), seed=1
    )
    expected = learn(Ablation.MATRIX, begun.network, begun.control, tasks, settings)
    (one,) = [x for x in found["runs"] if (x["ablation"], x["seed"]) == ("matrix", 1)]
    assert one["alpha"] == expected.alpha.tolist()
    assert one["correlation"] == {
        name: {"head": float(row)}
        for name, row in zip(("head", "wide"), expected.sigma, strict=True)
    }
    for name in ("updates", "inner_steps", "evaluations", "values"):
        assert one[name] == getattr(expected, name)
    kept = load_weights(out / "weights" / "matrix-1-head.safetensors")
    for x, y in zip(
        named(kept.control).values(), named(expected.models["head"]).values(), strict=True
    ):
        assert torch.equal(x, y)
    assert kept.record["sigma"] == one["sigma"]
    for task in tasks.of("test"):
        methods = {
            "ours": network_methods(kept)["ours"],
            "zero-filled": lambda kspace, _: zero_filled(kspace),
        }
        scores = evaluate(methods, task.parts["test"], task.sampling, 2).mean
        assert one["scores"]["head"][task.name]["psnr"] == pytest.approx(scores["ours"].psnr)
        assert one["scores"]["head"][task.name]["ssim"] == pytest.approx(scores["ours"].ssim)
        assert found["zero_filled"][task.name]["psnr"] == pytest.approx(scores["zero-filled"].psnr)
    psnr = [x["scores"]["head"]["head"]["psnr"] for x in found["runs"] if x["ablation"] == "matrix"]
    summary = found["summary"]["matrix"]["psnr"]
    assert summary["mean"] == pytest.approx(sum(psnr) / 2)
    assert summary["spread"] == pytest.approx(abs(psnr[0] - psnr[1]) / 2**0.5)


def test_options_reach_the_settings(files, tmp_path, monkeypatch):
    seen = []

    def probe(ablation, network, control, tasks, settings, *rest):
        seen.append((ablation, network.architecture, settings, len(tasks.every)))
        return learn(ablation, network, control, tasks, replace(settings, seconds=1e-3))

    monkeypatch.setattr("applications.mri.meta.experiment.learn", probe)
    task = "name=more,anatomy=brain_t1_axial,size=24,coils=2,acceleration=2,center=0.25"
    options = [
        *("--tasks", files / "tasks.yaml", "--task", task, "--out", tmp_path / "out"),
        *("--init", files / "w.safetensors", "--ablations", "vector", "--seconds", 2),
        *("--evaluations", 7, "--method", "one-step", "--optimizer", "sgd", "--inner-steps", 1),
        *("--learning-rate", 0.1, "--outer-rate", 0.2, "--outer-clip", 0.3),
        *("--learn-share", 0.9, "--batch", 2, "--crop", 8, "--device", "cpu"),
        *(
            "--entropy",
            0.3,
            "--floor",
            0.04,
            "--penalty",
            0.5,
            "--penalty-rate",
            0.7,
            "--seed",
            6,
            "--keep-graphs",
        ),
    ]
    succeed("meta-train", *options)
    ((ablation, architecture, settings, n_tasks),) = seen
    assert (ablation, n_tasks) == (Ablation.VECTOR, 4)
    assert architecture == load_weights(files / "w.safetensors").network.architecture
    assert settings == MetaSettings(
        2.0,
        7,
        Method.ONE_STEP,
        "sgd",
        inner_steps=1,
        learning_rate=0.1,
        outer_rate=0.2,
        outer_clip=0.3,
        learn_share=0.9,
        batch=2,
        crop=8,
        entropy=0.3,
        floor=0.04,
        penalty=0.5,
        penalty_rate=0.7,
        checkpointing=bl.Checkpointing(block=None),
        seed=6,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*BUDGET], "tasks were needed, got none"),
        (["--tasks", "none.yaml", *BUDGET], "none.yaml: a task list was needed"),
        (["--task", "name=a,anatomy=brain_t1_axial"], "a training needs a budget"),
        (["--task", "name=a,roles=train", *BUDGET], "scans, a folder, or anatomy"),
        (["--task", "name=a,anatomy=x,size=24,coils=2", *BUDGET], "the anatomy must be one of"),
        (["--task", "name=a,anatomy=x", *BUDGET, "--ablations", "vector,best"], "got 'best'"),
        (["--task", "name=a,anatomy=x", *BUDGET, "--ablations", ""], "got none"),
        (["--task", "name=a,anatomy=x", *BUDGET, "--preset", "large"], "preset must be one of"),
        (["--task", "name=a,anatomy=x", *BUDGET, "--device", "cuda:9"], "'cuda:9' needs a GPU"),
        (["--task", "name=a,anatomy=x", *BUDGET, "--outer-clip", "0"], "outer_clip must be > 0"),
        (
            ["--task", "name=a,anatomy=brain_t1_axial,size=24,coils=2,roles=train", *BUDGET],
            "M = 0 of 1 tasks",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, options, message):
    assert message in refused("meta-train", "--out", tmp_path / "out", *options)


def test_an_interrupted_run_keeps_the_scores_of_the_trainings_that_ended(
    files, run, tmp_path, monkeypatch
):
    def ends(ablation, *rest):
        if ablation == Ablation.VECTOR:
            raise KeyboardInterrupt
        return learn(ablation, *rest)

    monkeypatch.setattr("applications.mri.meta.experiment.learn", ends)
    options = ["--tasks", files / "tasks.yaml", "--init", files / "w.safetensors"]
    ways = ("--ablations", "uniform,vector")
    found = call("meta-train", *options, "--out", tmp_path / "out", *BUDGET, *ways)
    assert found.exit_code == 130
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["ablation"] for one in kept["runs"]] == list(kept["summary"]) == ["uniform"]
    (whole,) = [x for x in run[2]["runs"] if (x["ablation"], x["seed"]) == ("uniform", 0)]
    assert kept["runs"][0]["scores"] == whole["scores"]
