"""How the figures of the gallery look, and what is said of them to those who cannot see them."""

import re

import matplotlib.pyplot as plt
import torch
from cycler import cycler
from sphinx_gallery.scrapers import matplotlib_scraper

# Figures have no background, so that they stand on a light page and on a dark one. This grey has a
# contrast of 4.3 with white and with furo's dark background, the most that one grey can have with
# both; the colours of lines are about as bright.
INK = "#7a7a7a"
COLOURS = ["#2f82c4", "#d1561f", "#2b9467", "#a05fc0", "#b5851a", INK]
STYLE = {
    "figure.figsize": (
        6.0,
        4.0,
    ),  # inches of 100 pixels; text is readable at 400 pixels too
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "font.size": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "hatch.color": INK,
}

# The first scripts of a section; the others follow by name.
FIRST = [
    "decay_each_layer.py",
    "ridge_every_method.py",
    "clean_digits.py",
    "van_der_pol.py",
]
FIRST += ["pendulum.py", "reconstruction.py"]


class Order:
    """The order of scripts in a section, as a sort key of sphinx-gallery."""

    def __init__(self, _folder: str) -> None:
        pass

    def __call__(self, name: str) -> tuple[int, str]:
        return FIRST.index(name) if name in FIRST else len(FIRST), name


def fresh(*_about: object) -> None:
    """Begin each script with the style, and with torch as it is when it is imported.

    But for threads: on tensors as small as these they only wait for each other.
    """
    plt.rcdefaults()
    plt.rcParams.update(STYLE)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


def described(
    block: tuple, block_vars: dict, gallery_conf: dict, **options: object
) -> str:
    """Figures with the text of the comment `# sphinx_gallery_alt = "..."` as their alt text."""
    rst = matplotlib_scraper(block, block_vars, gallery_conf, **options)
    alt = block_vars.get("file_conf", {}).get("alt")
    return (
        rst
        if alt is None
        else re.sub(r"(?m)(:alt:).*$", lambda m: f"{m[1]} {alt}", rst)
    )
