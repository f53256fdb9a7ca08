"""The API pages name everything that is public."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import bilevel as bl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
imports = pytest.importorskip("imports", reason="the docs need sphinx")
plain_code = importlib.import_module("plain_code")
PAGES = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.rst"))
)
# The command line, and inner workings.
HIDDEN = {"mri.__main__", "toy.__main__", "toy.cli"}
HIDDEN |= {
    f"mri.commands.{name}" for name in ("app", "meta", "reports", "scans", "shared", "train")
}
HIDDEN |= {f"mri.formats.{name}" for name in ("hdf5", "ismrmrd_header", "lines")}
HIDDEN |= {"mri.sampling.darts"}


def described(kinds: str) -> set[str]:
    return set(re.findall(rf"^\.\. (?:{kinds}):: ([\w.]+)$", PAGES, re.MULTILINE))


def test_every_public_name_of_the_library_is_on_an_api_page():
    assert set(bl.__all__) - described("autoclass|autofunction|autoexception") == set()


def test_every_module_of_the_applications_is_on_an_api_page():
    folder = ROOT / "applications"
    modules = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }
    described_ = described("automodule|py:module")
    assert described_ == {f"applications.{name}" for name in modules - HIDDEN}


# What users neither make nor write.
RECORDS = {"LinearResult", "LinearSolver", "Prox", "Restore"}


def documented() -> list[tuple[str, object]]:
    """The classes and functions of the front door and of the packages that have settings."""
    packages = ("bilevel", "bilevel.optim", "bilevel.prox", "bilevel.linear")
    modules = [importlib.import_module(name) for name in packages]
    return [(name, getattr(module, name)) for module in modules for name in module.__all__]


@pytest.mark.parametrize(("name", "value"), documented(), ids=[name for name, _ in documented()])
def test_a_public_class_has_an_example_that_can_be_copied(name, value):
    text = inspect.getdoc(value) or ""
    if name in RECORDS or (inspect.isclass(value) and issubclass(value, Exception | Warning)):
        return
    assert "Example:\n" in text, f"{name} has no example"
    lines = text.splitlines()
    code = "\n".join([*imports.imports_for(value, lines), imports.code_of(lines)])
    assert imports.missing(code) == set()


def test_code_on_the_pages_fits_its_column():
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    blocks = [
        (path.name, line)
        for path in pages
        for block in re.findall(
            r"^```pycon\n(.*?)^```",
            path.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
        for line in plain_code.without_prompts(block).splitlines()
    ]
    assert [(name, line) for name, line in blocks if len(line) > 80] == []
    assert len(blocks) > 500
