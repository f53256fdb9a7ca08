import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from typer.testing import CliRunner

from applications.errors import InputError
from applications.settings import Method
from applications.toy.cli import app
from applications.toy.data import load
from applications.toy.task_results import Settings
from applications.toy.task_weights import run_task_weights
from applications.toy.tasks import TaskSettings, make_tasks

pytestmark = pytest.mark.xdist_group("task_weights")  # what its tests share is made once

# As by default, but few and small tasks, for the sake of time.
SMALL = Settings(
    TaskSettings(1, 2, 60, 40, 100),
    seeds=1,
    updates=12,
    inner_steps=10,
    fit_steps=60,
    adapt_steps=9,
)
QUICK = replace(SMALL, tasks=TaskSettings(1, 2, 12, 6, 20), updates=2, inner_steps=5, fit_steps=3)
TINY = [*("--tasks", 1, "--validations", 2, "--train", 12, "--validation", 6, "--test", 20)]
TINY += [*("--seeds", 2, "--updates", 2, "--inner-steps", 3, "--fit-steps", 4)]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def silent(stage, share):
    pass


@cache
def quick(method=QUICK.method):
    return run_task_weights(replace(QUICK, method=method), silent)


@pytest.fixture(scope="module")
def result():
    return run_task_weights(SMALL, silent)


def test_the_weights_find_the_related_tasks(result):
    run = result.runs[0]
    assert result.related.tolist() == [[True, False], [False, True], [False] * 2, [False] * 2]
    torch.testing.assert_close(run.matrix.sigma.sum(0), torch.ones(2).double())
    assert run.matrix.related_mass.min() > 0.9  # 0.25 at equal weights
    assert run.vector.related_mass > 0.9  # 0.5 at equal weights
    expected = torch.where(result.related, run.matrix.sigma, 0).sum(0)
    torch.testing.assert_close(run.matrix.related_mass, expected)
    assert run.matrix.values[-1] < 0.7 * run.matrix.values[0]


def test_learned_weights_are_worth_more_than_equal_ones(result):
    found = {way: float(result.accuracy(way)[0]) for way in result.runs[0].accuracies}
    assert found["learned matrix"] > found["uniform weights"] + 0.1
    assert found["learned vector"] > found["uniform weights"] + 0.05
    assert found["learned matrix"] > found["oracle"] - 0.05
    assert all(0.2 < value <= 1 for value in found.values())


def test_the_same_seed_gives_the_same_and_another_gives_other_tasks():
    one, again = quick(), run_task_weights(QUICK, silent)
    assert torch.equal(one.runs[0].matrix.sigma, again.runs[0].matrix.sigma)
    for way, found in one.runs[0].accuracies.items():
        assert torch.equal(found, again.runs[0].accuracies[way])
    other = run_task_weights(replace(QUICK, seed=1), silent)
    assert not torch.equal(one.runs[0].matrix.sigma, other.runs[0].matrix.sigma)


def test_the_method_asked_for_is_used():
    sigma = {method: quick(method).runs[0].matrix.sigma for method in Method}
    torch.testing.assert_close(sigma[Method.MLM], sigma[Method.UNROLLED], rtol=1e-9, atol=0)
    for method in (Method.IMPLICIT, Method.ONE_STEP):  # exact at other points, or not at all
        assert not torch.allclose(sigma[method], sigma[Method.UNROLLED], rtol=1e-6, atol=0)


def test_no_sample_is_in_two_tasks_and_kinds_are_what_they_say():
    data = load()
    data = replace(data, inputs=data.inputs + torch.arange(1797)[:, None])  # tells samples apart
    tasks = make_tasks(data, TaskSettings(2, 3, 10, 5, 7), torch.Generator().manual_seed(0))
    parts = (tasks.train, tasks.validation, tasks.test)
    numbers = torch.cat([part.inputs.min(2).values.floor().flatten() for part in parts])
    assert len(numbers.unique()) == len(numbers) == 8 * 10 + 3 * 5 + 3 * 7
    right = data.labels[tasks.train.inputs.min(2).values.floor().long()] == tasks.train.labels
    assert right[:4].all()
    assert not right[4:6].any()
    assert 0 <= int(right[6:].sum()) <= 8  # 2 of 20 in the mean, by chance
    assert tasks.train.names[::2] == ("upright 1", "turned 1", "mislabelled 1", "random labels 1")
    assert tasks.validation.names == ("upright 1", "turned 1", "upright 2")
    assert tasks.related.sum(0).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSettings(tasks=0), "tasks must be at least 1, got 0"),
        (lambda: Settings(seeds=0), "seeds must be at least 1, got 0"),
        (lambda: Settings(decay=0.0), "decay must be > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_command_writes_results_and_a_figure(tmp_path):
    found = call("task-weights", "--out", tmp_path / "a" / "b", *TINY, "--method", "mlm")
    assert found.exit_code == 0, found.output
    assert "learned matrix" in found.stdout
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "figure.png",
        "results.json",
    ]
    assert (tmp_path / "a" / "b" / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    results = json.loads((tmp_path / "a" / "b" / "results.json").read_text())
    assert results["settings"]["method"] == "mlm"
    sizes = {"tasks": 1, "validations": 2, "train": 12, "validation": 6, "test": 20}
    assert results["settings"]["tasks"] == sizes
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    for run in results["runs"]:
        sums = torch.tensor(run["matrix"]["sigma"]).sum(0)
        torch.testing.assert_close(sums, torch.ones(2))
        assert len(run["vector"]["values"]) == 2
    means = [sum(run["accuracies"]["oracle"]) / 2 for run in results["runs"]]
    assert results["accuracy"]["oracle"]["mean"] == pytest.approx(sum(means) / 2)
    spread = abs(means[0] - means[1]) / 2**0.5
    assert results["accuracy"]["oracle"]["spread"] == pytest.approx(spread)


def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path):
    for options, message in (
        (["--data", tmp_path / "none"], "none: a folder of IDX files was needed"),
        (["--test", 2000], r"digits: .* samples were needed, there are 1797; ask for fewer"),
        (["--threads", 1, "--train", 1700], "samples were needed, there are 1797"),
    ):
        found = call("task-weights", "--out", tmp_path / "out", *options)
        assert found.exit_code == 2
        assert found.stderr.startswith("error: ")
        assert found.stderr.count("\n") == 1
        assert message.split(".*")[-1] in found.stderr
    (tmp_path / "file").write_text("kept")
    found = call("task-weights", "--out", tmp_path / "file", *TINY)
    assert found.exit_code == 2
    assert "file: the folder cannot be made" in found.stderr
    assert not (tmp_path / "out").exists()
