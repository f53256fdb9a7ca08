"""`train` and `meta-train` on several processes, as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_cases import write_scans

from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, save_weights

pytestmark = pytest.mark.slow  # several processes, each of which loads torch

ROOT = Path(__file__).parents[3]
TASKS = """
defaults: {size: 24, coils: 2, acceleration: 2, center: 0.25, anatomy: brain_t1_axial}
tasks:
  - {name: head, roles: [train, validation, test]}
  - {name: wide, coils: 4, roles: [train, validation]}
  - {name: fast, acceleration: 3, roles: [train]}
"""
BUDGET = "--evaluations 40 --inner-steps 2 --crop 0 --keep-graphs --seeds 1 --adapt-steps 1"


def run(processes, *arguments):
    start = [sys.executable, "-m", "applications.mri"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={processes}", "-m", "applications.mri"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = [*start, *map(str, arguments)]
    return subprocess.run(
        given, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False
    )


def small(folder):
    network = Network(replace(paper(3), n_phases=1, filters=2, features=2, feature_kernel=3), 1)
    save_weights(folder / "w.safetensors", Trained(network, network.controls(), {}))
    return folder / "w.safetensors"


def difference(one, other):
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_training_on_two_processes_is_that_on_one(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    write_scans(scans)
    given = ["train", "--data", scans, "--init", small(tmp_path), "--steps", 3, "--crop", 0]
    given += ["--acceleration", 2, "--center", 0.25, "--accumulate", 2]
    found = {}
    for n in (1, 2):
        found[n] = run(n, *given, "--out", tmp_path / f"{n}.safetensors")
        assert found[n].returncode == 0, found[n].stderr
    assert found[2].stdout.count("3 updates in") == 1  # one of them speaks
    assert difference(tmp_path / "1.safetensors", tmp_path / "2.safetensors") < 1e-6
    refused = run(2, *given[:-1], 3, "--out", tmp_path / "no.safetensors")
    assert refused.returncode != 0
    assert "2 processes need a multiple of 2 slices an update" in refused.stderr
    assert not (tmp_path / "no.safetensors").exists()


def test_tasks_and_columns_on_two_processes_teach_what_they_do_on_one(tmp_path):
    (tmp_path / "tasks.yaml").write_text(TASKS)
    given = ["meta-train", "--tasks", tmp_path / "tasks.yaml", "--init", small(tmp_path)]
    for n in (1, 2):
        found = run(n, *given, *BUDGET.split(), "--out", tmp_path / f"{n}")
        assert found.returncode == 0, found.stderr
    weights = sorted(path.name for path in (tmp_path / "1" / "weights").iterdir())
    assert weights == sorted(path.name for path in (tmp_path / "2" / "weights").iterdir())
    for name in weights:
        one, two = (tmp_path / n / "weights" / name for n in "12")
        assert difference(one, two) < 1e-6, name
    one, two = (json.loads((tmp_path / n / "results.json").read_text())["runs"] for n in "12")
    for key in ("ablation", "updates", "inner_steps", "evaluations"):
        assert [x[key] for x in one] == [x[key] for x in two]
