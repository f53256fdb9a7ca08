"""Configuration of the documentation; `make docs` builds it, with or without a network."""

import re
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.transforms import SphinxTransform

from bilevel import __version__

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE)]  # and gallery_style

project = "bilevel"
author = "The bilevel developers"
copyright = "2025, The bilevel developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    # What the site has of its own, in _ext.
    "drawings",
    "imports",
    "offline_math",
    "parameters",
    "plain_code",
    "public_names",
]
exclude_patterns = ["_build", "_ext", "figures", "peers"]
default_role = "code"  # docstrings write names in single backticks
myst_enable_extensions = [
    "amsmath",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "bilevel"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "sidebar_hide_name": False,
    "navigation_with_keys": True,
    "light_css_variables": {
        "color-brand-primary": "#3b5bb5",
        "color-brand-content": "#3b5bb5",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8fb0ff",
        "color-brand-content": "#8fb0ff",
    },
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand with the parameters
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = (
    True  # fields of dataclasses; as attributes they would be described twice
)

# Every script in examples/ is run, and runs again only when it changes: `make clean` forgets them.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "subsection_order": [
        *(
            "../examples/learning",
            "../examples/control",
            "../examples/trust",
            "*",
        ),
        "../examples/mri",
    ],
    "within_subsection_order": "gallery_style.Order",
    "image_scrapers": ("gallery_style.described",),
    "image_srcset": ["2x"],
    "reset_modules": ("gallery_style.fresh",),
    "remove_config_comments": True,
    "show_signature": False,
    "download_all_examples": False,
    "write_computation_times": False,  # pages that ask other hosts for scripts
    "capture_repr": (),  # what a script prints is shown, and nothing else
    "doc_module": ("bilevel", "applications"),
}

# Inventories of other projects are optional: those that can be fetched are used, and without a
# network names such as torch.Tensor are just not links.
INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
}


ELSEWHERE = r"(torch|numpy|collections|pathlib|abc|enum|functools|h5py|inspect|typer|typing|os)\..*"


def fetched(url: str, path: Path) -> bool:
    """Whether the inventory of `url` is at `path`, fetched now if it was not."""
    if not path.exists():
        try:
            with urllib.request.urlopen(
                f"{url}objects.inv", timeout=5
            ) as answer:
                content = answer.read()
        except (OSError, HTTPException):
            return False
        if not content.startswith(b"# Sphinx inventory"):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return True


def add_inventories(app: Sphinx, config: Config) -> None:
    """Give intersphinx the inventories that exist."""
    folder = Path(app.doctreedir) / "inventories"
    config.intersphinx_mapping = {
        name: (url, str(folder / f"{name}.inv"))
        for name, url in INVENTORIES.items()
        if fetched(url, folder / f"{name}.inv")
    }
    if len(config.intersphinx_mapping) < len(INVENTORIES):
        config.nitpick_ignore_regex = [
            *config.nitpick_ignore_regex,
            ("py:.*", ELSEWHERE),
        ]


# Classes that the pages of the applications leave out; see HIDDEN in tests/test_docs.py.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"applications\.(mri\.formats\.lines\.Placed|options\.Settings|mri\.formats\.hdf5\.\w+|keeping\.T)",
    ),
    (
        "py:.*",
        r"bilevel\.(settings\.Stepwise|outer\.keep\.Stateful|sweeps\.memory\.Rehearsed)",
    ),
    ("py:.*", r"bilevel\.methods\.instance\.(Draws|OuterGradient)"),
    ("py:.*", r"bilevel\.autodiff\..*|typer\..*|h5py\..*"),
]


class Magnitudes(SphinxTransform):
    """Text between bars is a magnitude, as docstrings write |J u(T)|, and no substitution."""

    default_priority = 200  # before the substitutions themselves

    def apply(self, **kwargs: object) -> None:  # noqa: ARG002
        """Put the bars back."""
        for node in list(self.document.findall(nodes.substitution_reference)):
            node.replace_self(nodes.Text(f"|{node.astext()}|"))


def readable(*event: object) -> tuple[str | None, object]:
    """A signature whose defaults that are no Python, such as <factory>, are dots."""
    *_, signature, returned = event
    return (
        re.sub(r"<[^<>]*>", "...", signature) if signature else None
    ), returned


def setup(app: Sphinx) -> None:
    """Add what is above; the inventories before intersphinx reads its mapping, at 800."""
    app.add_transform(Magnitudes)
    app.connect("autodoc-process-signature", readable)
    app.connect("config-inited", add_inventories, priority=400)
