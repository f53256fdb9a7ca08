"""Public names: one table of them, and links of private paths to them."""

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

FRONT = "bilevel"
PACKAGES = ["bilevel"] + [
    f"bilevel.{name}"
    for name in [
        "control",
        "dynamics",
        "methods",
        "certificates",
        "optim",
        "prox",
        "linear",
        "sweeps",
        "tasks",
        "outer",
        "inner",
        "solution",
        "testing",
        "errors",
    ]
]


# Handed on between rooms, and of no use to users.
INNER = {"InnerIteration", "Interrupts", "Kept", "Loop", "Trees", "opened"}


def public(package: str) -> Iterator[tuple[str, Any]]:
    """Names of a package, or of a module, with what they name."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == package
    ]
    for name in names:
        yield name, getattr(module, name)


def private_paths() -> dict[str, str]:
    """Where a thing is defined, to where it is public: the front door, if it is there."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for name, value in public(package):
            if hasattr(value, "__qualname__"):
                found.setdefault(
                    f"{value.__module__}.{value.__qualname__}",
                    f"{package}.{name}",
                )
    return found


def first_sentence(value: Any) -> str:
    """The first line of a docstring, of the class or of what it overrides."""
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")


class PublicNames(SphinxDirective):
    """A table of the names of the packages given, with a line each."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The table, as reStructuredText, since docstrings are written in it."""
        text = [".. list-table::", "   :class: names", "   :widths: 35 65", ""]
        for package in self.content:
            for name, value in public(package.strip()):
                role = "func" if inspect.isfunction(value) else "class"
                if inspect.isclass(value) and issubclass(value, BaseException):
                    role = "exc"
                if name in INNER:
                    continue
                path = private_paths().get(
                    f"{value.__module__}.{value.__qualname__}", ""
                )
                if path != f"{package.strip()}.{name}":
                    continue  # it is in the table of the front door
                text += [
                    f"   * - :{role}:`~{path}`",
                    f"     - {first_sentence(value)}",
                ]
        container = nodes.container()
        self.state.nested_parse(StringList(text, "names"), 0, container)
        return container.children


class PublicPaths(SphinxTransform):
    """Cross-references go to where a name is public."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:  # noqa: ARG002
        """Mend the references of this document."""
        from sphinx.addnodes import pending_xref

        known = private_paths()
        for node in self.document.findall(pending_xref):
            target = node.get("reftarget", "")
            if target in known:
                node["reftarget"] = known[target]


def as_public(text: str) -> str:
    """A text, of a signature or a type, with public paths for private ones."""
    known = private_paths()
    return re.sub(r"bilevel(?:\.\w+)+", lambda m: known.get(m[0], m[0]), text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the table and the transform."""
    app.add_directive("public-names", PublicNames)
    app.add_transform(PublicPaths)
    return {"parallel_read_safe": True}
