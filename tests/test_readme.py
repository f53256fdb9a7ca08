"""The code of the README runs, and prints what it says that it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
)
NUMBER = re.compile(r"-?\d+\.?\d*")


def promised(code: str) -> list[str]:
    """The comments that follow a print."""
    return re.findall(r"^print\(.*\)\n# (.*)$", code, re.M)


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


def test_its_code_fits_eighty_columns():
    assert [line for code in BLOCKS for line in code.splitlines() if len(line) > 80] == []


def test_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)}
    local = {target for target in targets if "://" not in target and target}
    assert {target for target in local if not (ROOT / target).exists()} == set()
