"""The scripts of the gallery run, and what each claims holds: they end with assertions.

Here some are made smaller; the site runs them as they stand.
"""

import ast
import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
# Constants of scripts that would take longer than a test may.
SMALLER: dict[str, dict[str, object]] = {
    "learning/learned_start.py": {"UPDATES": 60},
    "control/unrolled_network.py": {"UPDATES": 150},
    "solvers/deep_equilibrium.py": {"UPDATES": 60},
}
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
every_script = pytest.mark.parametrize(
    "path", SCRIPTS, ids=[path.relative_to(EXAMPLES).as_posix() for path in SCRIPTS]
)


@pytest.fixture
def pyplot(monkeypatch):
    """Figures are drawn, and shown to nobody."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    yield plt
    plt.close("all")


def assigned(node: ast.stmt) -> list[str]:
    if not isinstance(node, ast.Assign):
        return []
    return [x.id for x in ast.walk(node.targets[0]) if isinstance(x, ast.Name)]


def run(name: str, **smaller: object) -> dict:
    """What a script has at its end, run with other values of constants of it."""
    path = EXAMPLES / name
    module = ast.parse(path.read_text(encoding="utf-8"))
    for constant, value in smaller.items():
        (found,) = [node for node in module.body if assigned(node) == [constant]]
        found.value = ast.copy_location(ast.parse(repr(value), mode="eval").body, found.value)
    torch.manual_seed(0)
    found = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(ast.fix_missing_locations(module), str(path), "exec"), found)
    return found


@every_script
def test_an_example_does_what_it_claims_and_labels_its_figure(path, pyplot):
    name = path.relative_to(EXAMPLES).as_posix()
    run(name, **SMALLER.get(name, {}))
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert figures
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            named = axes.get_xlabel() or axes.get_ylabel() or axes.get_title()
            assert named or not axes.axison, axes


@every_script
def test_an_example_is_a_page_of_cells_with_a_claim_and_a_text_for_those_who_do_not_see(path):
    text = path.read_text(encoding="utf-8")
    module = ast.parse(text)
    title, rule = ast.get_docstring(module).splitlines()[:2]
    assert set(rule) == {"="}
    assert len(rule) == len(title)
    assert text.count("\n# %%\n") >= 3
    assert any(isinstance(node, ast.Assert) for node in module.body)
    alts = re.findall(r'^# sphinx_gallery_alt = "(.+)"$', text, re.MULTILINE)
    assert len(alts) == text.count("plt.show()") == 1


def test_constants_that_are_made_smaller_are_those_of_examples():
    assert [name for name in SMALLER if not (EXAMPLES / name).exists()] == []


def test_optimal_control_reaches_the_known_minimum_with_the_right_multipliers(pyplot):
    found = run("control/van_der_pol.py")
    assert found["solution"].cost == pytest.approx(1.048392993799, abs=5e-13, rel=0)
    residuals = found["residuals"]
    assert max(residuals.feasibility, residuals.costate) < 1e-12
    assert residuals.stationarity < 1e-7
    # Central differences with steps of 1e-5: truncation 1e-10, rounding 1e-11.
    assert found["multiplier_error"] < 1e-8
