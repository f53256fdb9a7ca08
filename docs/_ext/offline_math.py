"""MathJax from the site's own files: those of the package sphinx-mathjax-offline, at build time."""

from importlib.metadata import files
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

PACKAGE = "sphinx-mathjax-offline"
SCRIPT = "mathjax/tex-chtml.js"


def mathjax() -> Path:
    """The folder of MathJax in the package."""
    found = [
        path
        for path in files(PACKAGE) or []
        if path.as_posix().endswith(SCRIPT)
    ]
    return Path(str(found[0].locate())).parent


def copy(app: Sphinx, error: Exception | None) -> None:
    """Copy what pages with formulas load, and nothing that they do not."""
    if error is None and app.builder.format == "html":
        target = Path(app.outdir) / "_static" / "mathjax"
        copy_asset(mathjax() / "tex-chtml.js", target)
        copy_asset(mathjax() / "output" / "chtml", target / "output" / "chtml")
        copy_asset(mathjax() / "a11y" / "assistive-mml.js", target / "a11y")


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell the pages where it is."""
    app.config.mathjax_path = SCRIPT
    app.config.mathjax3_config = {
        "loader": {"load": ["a11y/assistive-mml"]},  # for screen readers
        "options": {"enableMenu": False},
    }
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True}
