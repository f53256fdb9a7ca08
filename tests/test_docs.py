"""The API pages name everything that is public."""

import re
from pathlib import Path

import bilevel as bl

ROOT = Path(__file__).parent.parent
PAGES = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.rst"))
)
HIDDEN = {"__init__", "__main__", "cli", "darts", "hdf5"}  # the command line, and inner workings


def described(kinds: str) -> set[str]:
    return set(re.findall(rf"^\.\. (?:{kinds}):: ([\w.]+)$", PAGES, re.MULTILINE))


def test_every_public_name_of_the_library_is_on_an_api_page():
    assert set(bl.__all__) - described("autoclass|autofunction|autoexception") == set()


def test_every_module_of_the_mri_application_is_on_an_api_page():
    modules = {path.stem for path in (ROOT / "applications" / "mri").glob("*.py")} - HIDDEN
    assert described("automodule|py:module") == {f"applications.mri.{name}" for name in modules}
