"""The example scripts run as they stand, and reach the answers they are known to have."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / name))


def test_every_example_has_a_test_here():
    text = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert names
    assert [name for name in names if f'run("{name}")' not in text] == []


def test_optimal_control_reaches_the_known_minimum_with_the_right_multipliers():
    found = run("optimal_control.py")
    assert found["cost"] == pytest.approx(1.048392993799, abs=5e-13, rel=0)
    residuals = found["residuals"]
    assert max(residuals.feasibility, residuals.costate) < 1e-12
    assert residuals.stationarity < 1e-7
    # Central differences with steps of 1e-5: truncation 1e-10, rounding 1e-11.
    assert found["multiplier_error"] < 1e-8


def test_phases_as_dynamics_has_the_gradient_of_autograd_and_learns():
    found = run("phases_as_dynamics.py")
    assert found["gradient_error"] < 1e-12
    assert found["cost"] < 0.25 * found["cost_before"]


def test_a_meta_learned_start_helps_on_tasks_never_seen():
    found = run("meta_learned_start.py")
    scores = found["scores"]
    # Lines are drawn around (2, -1): a start there is what can be learned.
    for control in (found["found"].control, found["found_implicit"].control):
        assert control.tolist() == pytest.approx([2.0, -1.0], abs=0.35)
    for kind in ("MAML", "iMAML"):
        assert scores[f"{kind}, learned start"] < 0.5 * scores[f"{kind}, start at zero"]


def test_learned_beliefs_make_a_better_portfolio():
    found = run("learning/portfolio.py")
    assert found["one"].certificate.trustworthy
    assert -found["found"].values[-1] > -found["found"].values[0]
    assert found["score"](found["found"].control) > found["even"]


def test_labels_are_cleaned_through_a_loss_without_second_derivatives():
    found = run("learning/cleaning_without_second_derivatives.py")
    learned, wrong = found["learned"], found["wrong"]
    assert float(learned[wrong].mean()) < 0.7 * float(learned[~wrong].mean())
    assert float(found["difference"]) < 1e-3
    for order in (1, 2):
        ratios = torch.tensor(found["estimates"][order]) / torch.tensor(found["errors"][order])
        assert bool((ratios > 1 / 3).all())
