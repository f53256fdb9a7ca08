"""The API pages name everything that is public."""

import re
from pathlib import Path

import bilevel as bl

ROOT = Path(__file__).parent.parent
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
