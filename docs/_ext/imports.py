"""Examples in docstrings begin with the imports they need, so that they can be copied."""

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from public_names import private_paths
from sphinx.application import Sphinx


def code_of(lines: list[str]) -> str:
    """The code of the doctests among the lines."""
    found = (re.match(r"\s*(?:>>>|\.\.\.) ?(.*)$", line) for line in lines)
    return "\n".join(match[1] for match in found if match)


def missing(code: str) -> set[str]:
    """Names that the code reads and does not make."""
    tree = ast.parse(code)
    read, made = set(), set(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return read - made


def statements(
    names: set[str], space: dict[str, Any], module: str
) -> Iterator[str]:
    """An import of each name that a module has."""
    for name in sorted(names & set(space)):
        value = space[name]
        if inspect.ismodule(value):
            package, _, last = value.__name__.rpartition(".")
            if value.__name__ == name:
                yield f"import {name}"
            elif last == name:
                yield f"from {package} import {name}"
            else:
                yield f"import {value.__name__} as {name}"
            continue
        path = f"{getattr(value, '__module__', module)}.{getattr(value, '__qualname__', name)}"
        home = private_paths().get(
            path, f"{getattr(value, '__module__', module)}.{name}"
        )
        yield f"from {home.rpartition('.')[0]} import {name}"


def imports_for(thing: Any, lines: list[str]) -> list[str]:
    """The import statements that an example of `thing` lacks."""
    module = getattr(
        inspect.unwrap(getattr(thing, "fget", None) or thing),
        "__module__",
        None,
    )
    code = code_of(lines)
    if not code or module not in sys.modules:
        return []
    needed = statements(missing(code), vars(sys.modules[module]), module)
    return sorted(
        needed, key=lambda line: (line.startswith("from bilevel"), line)
    )


def with_imports(
    app: Sphinx,
    what: str,
    name: str,
    thing: Any,
    options: Any,
    lines: list[str],
) -> None:
    """Put them before the first line of code."""
    del app, what, name, options
    first = next(
        (i for i, line in enumerate(lines) if line.lstrip().startswith(">>> ")),
        None,
    )
    if first is not None:
        indent = lines[first][: lines[first].index(">>>")]
        lines[first:first] = [
            f"{indent}>>> {line}" for line in imports_for(thing, lines)
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Before napoleon takes the sections apart."""
    app.connect("autodoc-process-docstring", with_imports, priority=390)
    return {"parallel_read_safe": True}
