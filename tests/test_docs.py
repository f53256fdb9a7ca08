"""The API pages name everything that is public."""

import ast
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
public_names = importlib.import_module("public_names")
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


def documented() -> dict[str, object]:
    """Every class and function of the packages that users import from, by a public name."""
    found: dict[int, tuple[str, object]] = {}
    for package in public_names.PACKAGES:
        for name, value in public_names.public(package):
            if name not in public_names.INNER and (
                inspect.isclass(value) or inspect.isfunction(value)
            ):
                found.setdefault(id(value), (f"{package}.{name}", value))
    return dict(found.values())


def test_many_names_are_public():
    assert len(documented()) > 120


@pytest.mark.parametrize("name", documented())
def test_a_public_name_has_an_example_that_can_be_copied(name):
    value = documented()[name]
    text = inspect.getdoc(value) or ""
    assert "Example:\n" in text, f"{name} has no example"
    lines = text.splitlines()
    code = "\n".join([*imports.imports_for(value, lines), imports.code_of(lines)])
    assert imports.missing(code) == set()
    assert [line for line in code.splitlines() if len(line) > 80] == []


PAGES_OF_TEXT = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def blocks_of(path: Path) -> list[str]:
    """What stands in a page as code, without prompts."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        plain_code.without_prompts(code) if code.startswith(">>>") else code
        for language, code in found
        if not language.startswith("{")  # a directive
    ]


def test_code_on_the_pages_fits_its_column():
    lines = [
        (path.name, line)
        for path in PAGES_OF_TEXT
        if "_build" not in path.parts
        for block in blocks_of(path)
        for line in block.splitlines()
    ]
    assert [(name, line) for name, line in lines if len(line) > 80] == []
    assert len(lines) > 1000


def test_code_of_the_gallery_fits_its_column():
    """Lines that are code, or a comment inside of it; cells of text are wrapped by the page."""
    wide = []
    for path in sorted((ROOT / "examples").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        head = ast.parse(text).body[0].end_lineno
        in_text = False
        for number, line in enumerate(text.splitlines(), 1):
            in_text = line.startswith("# %%") or (in_text and line.startswith("#"))
            configures = line.startswith("# sphinx_gallery_")
            if number > head and len(line) > 80 and not in_text and not configures:
                wide.append((path.name, number))
    assert wide == []
