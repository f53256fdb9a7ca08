"""The code of the README runs, and prints what it says that it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
)
NUMBER = re.compile(r"-?\d+\.?\d*")


def code_with(call: str) -> str:
    """The block in which something is called."""
    (code,) = (code for code in BLOCKS if call in code)
    return code


def promised(code: str) -> list[str]:
    """The comments that follow a print."""
    return re.findall(r"^print\(.*\)\n# (.*)$", code, re.M)


@pytest.fixture
def beside_a_scan(tmp_path, monkeypatch):
    """A folder with a scan, as `bilevel-mri simulate --out data` leaves it."""
    settings = SimulationSettings(size=128, names=("brain_hires_t1",))
    simulate_folder(tmp_path / "data", settings)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("beside_a_scan")
def test_its_code_prints_what_it_says():
    space: dict[str, object] = {}
    for code in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), space)
        lines, wanted = printed.getvalue().splitlines(), promised(code)
        assert wanted, "a block shows what comes out"
        assert [NUMBER.sub("0", line) for line in lines] == [NUMBER.sub("0", x) for x in wanted]
        for line, expected in zip(lines, wanted, strict=True):
            # Float32 training is rounded in another way by another processor.
            found, told = ([float(x) for x in NUMBER.findall(text)] for text in (line, expected))
            assert found == pytest.approx(told, rel=0.05)


def test_its_examples_are_short():
    def lines(code):
        return [line for line in code.splitlines() if line and not line.startswith("#")]

    assert len(lines(code_with("bl.BilevelSolver("))) <= 15
    assert len(lines(code_with("reconstruct(kspace"))) <= 6  # five, and what is printed


def test_its_code_fits_eighty_columns():
    assert [line for code in BLOCKS for line in code.splitlines() if len(line) > 80] == []


def test_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)}
    local = {target for target in targets if "://" not in target and target}
    assert {target for target in local if not (ROOT / target).exists()} == set()
