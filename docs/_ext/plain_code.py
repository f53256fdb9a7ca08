"""Doctests become plain code: no prompts, results as comments, so that a reader can paste it."""

import re
from textwrap import wrap

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

COLUMNS = 78
PROMPTS = (">>>", "...")
FLAGS = re.compile(r"\s*#\s*doctest:.*$")


def without_prompts(session: str) -> str:
    """A session of Python's prompt as a script; each result follows as a comment."""
    lines: list[str] = []
    for line in session.splitlines():
        if line.startswith(PROMPTS):
            lines.append(FLAGS.sub("", line[4:]))
        elif line.strip() == "<BLANKLINE>":
            lines.append("#")
        else:
            result = wrap(
                line, COLUMNS, drop_whitespace=len(line) > COLUMNS
            ) or [""]
            lines += [f"# {part}" if part else "" for part in result]
    return _spaced(lines)


def _spaced(lines: list[str]) -> str:
    """With an empty line before a definition and after its body, as code is written."""
    spaced: list[str] = []
    for line in lines:
        indented = line.startswith((" ", ")", "]", "}"))
        opens = re.match(
            r"(def|class|@|for|with|try|while|if)\b", line
        ) is not None or (line.startswith("@"))
        before = spaced[-1] if spaced else ""
        after_body = (
            before.startswith("    ")
            and not indented
            and not before.endswith(",")
        )
        decorated = before.startswith("@")
        continues = line.startswith(("except", "finally", "else", "elif"))
        if before and not decorated and not continues:
            defines = opens and line.startswith(("def", "class", "@"))
            if (defines or (after_body and line)) and not line.startswith("#"):
                spaced.append("")
        spaced.append(line)
    return "\n".join(spaced).strip("\n")


class PlainCode(SphinxTransform):
    """Replaces doctests by scripts."""

    default_priority = 400

    def apply(self, **kwargs: object) -> None:  # noqa: ARG002
        """Replace those of this document."""
        for node in list(self.document.findall(nodes.doctest_block)):
            self._replace(node)
        for node in list(self.document.findall(nodes.literal_block)):
            if node.astext().startswith(">>> "):
                self._replace(node)

    def _replace(self, node: nodes.doctest_block | nodes.literal_block) -> None:
        code = without_prompts(node.astext())
        node.replace_self(nodes.literal_block(code, code, language="python"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform."""
    app.add_transform(PlainCode)
    return {"parallel_read_safe": True}
