"""Drawings stand in the page itself, so that they take its colours, light and dark."""

from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# Of figures by matplotlib.
COLOURS = {
    "fill: #ffffff": "fill: none",
    "#000000": "currentColor",
    "#444444": "currentColor",
    "#dddddd": "var(--color-background-border)",
}


class Drawing(SphinxDirective):
    """An SVG file, whose `currentColor` and `var(--...)` are those of the page."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {
        "alt": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """The drawing, described by its `alt`, with the content as its caption."""
        if "alt" not in self.options:
            raise self.error("a drawing needs an :alt: text")
        name, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(name)
        text = Path(path).read_text(encoding="utf-8")
        text = text[text.index("<svg") :]
        for given, own in COLOURS.items():
            text = text.replace(given, own)
        alt = nodes.Text(self.options["alt"]).astext().replace('"', "&quot;")
        text = text.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
        figure = nodes.container(classes=["drawing-figure"])
        figure += nodes.raw(
            "", f'<div class="drawing">{text}</div>', format="html"
        )
        if self.content:
            caption = nodes.container(classes=["drawing-caption"])
            self.state.nested_parse(self.content, self.content_offset, caption)
            figure += caption
        return [figure]


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": True}
