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
    "control/pendulum.py": {"ITERATIONS": 70},
    "control/unrolled_network.py": {"UPDATES": 150},
    "learning/clean_digits.py": {"UPDATES": 18},
    "learning/decay_each_layer.py": {"UPDATES": 5},
    "learning/distilled_digits.py": {"UPDATES": 20},
    "learning/learned_start.py": {"UPDATES": 25},
    "learning/ridge_every_method.py": {"INNER_STEPS": (3, 30, 300), "REPEATS": 1},
    "solvers/deep_equilibrium.py": {"UPDATES": 60},
    "trust/certificate_along_iteration.py": {"INNER_STEPS": (10, 40, 160)},
    "trust/memory_against_horizon.py": {"HORIZONS": (10, 100), "REPEATS": 1},
}
# What a test of seconds shows; the site runs all scripts, whole, and fails where an assertion does.
QUICK = {"control/lqr_against_scipy.py", "learning/learned_start.py", "solvers/deep_equilibrium.py"}
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


every_script = pytest.mark.parametrize("path", SCRIPTS, ids=relative)
every_run = pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (relative(p) not in QUICK)) for p in SCRIPTS],
    ids=relative,
)


@pytest.fixture
def pyplot(monkeypatch):
    """Figures are drawn, and shown to nobody."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    yield plt
    plt.close("all")


def set_constant(module: ast.Module, name: str, value: object) -> None:
    """Change `NAME = 1`, or one of `NAME, OTHER = 1, 2`, at the top of a script."""
    new = ast.parse(repr(value), mode="eval").body
    for node in module.body:
        if isinstance(node, ast.Assign):
            match node.targets[0], node.value:
                case ast.Name(id=found), _ if found == name:
                    node.value = new
                    return
                case ast.Tuple(elts=names), ast.Tuple(elts=values):
                    for i, one in enumerate(names):
                        if isinstance(one, ast.Name) and one.id == name:
                            values[i] = new
                            return
    raise AssertionError(f"the script has no constant {name}")


def run(name: str, **smaller: object) -> dict:
    """What a script has at its end, run with other values of constants of it."""
    path = EXAMPLES / name
    module = ast.parse(path.read_text(encoding="utf-8"))
    for constant, value in smaller.items():
        set_constant(module, constant, value)
    torch.manual_seed(0)
    found = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(ast.fix_missing_locations(module), str(path), "exec"), found)
    return found


@every_run
def test_an_example_does_what_it_claims_and_labels_its_figure(path, pyplot):
    name = relative(path)
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
    assert any(isinstance(node, ast.Assert) for node in ast.walk(module))
    alts = re.findall(r'^# sphinx_gallery_alt = "(.+)"$', text, re.MULTILINE)
    assert len(alts) == text.count("plt.show()") == 1


def test_constants_that_are_made_smaller_are_those_of_examples():
    assert [name for name in {*SMALLER, *QUICK} if not (EXAMPLES / name).exists()] == []
