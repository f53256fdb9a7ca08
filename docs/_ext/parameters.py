"""What a class or a function takes stands under "Parameters", with types and defaults."""

import dataclasses
import inspect
import re
from typing import Any

from public_names import as_public
from sphinx.application import Sphinx
from sphinx.util.inspect import object_description
from sphinx.util.typing import stringify_annotation

COLON = "\N{RATIO} "

# Dataclasses that come back from the library, and are not made by its users: they have fields.
RETURNED = {
    "Adjoint",
    "Certificate",
    "ControlSolution",
    "Correlation",
    "DotProductTest",
    "Found",
    "GradientCheck",
    "HessianProduct",
    "Hypergradient",
    "HypergradientCheck",
    "Instance",
    "KKT",
    "LinearResult",
    "Measurement",
    "MethodCheck",
    "Progress",
    "Schedule",
    "Solution",
    "Swept",
    "TaylorTest",
    "Truncation",
    "Warm",
}


def is_made_by_users(kind: type) -> bool:
    """Whether its fields are the parameters of its constructor, to a reader."""
    if not dataclasses.is_dataclass(kind) or kind.__name__ in RETURNED:
        return False
    if kind.__module__.startswith("bilevel."):
        return True
    made = [field for field in dataclasses.fields(kind) if field.init]
    return any(_default(field) is not inspect.Parameter.empty for field in made)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        if inspect.isclass(field.default_factory):
            return _Made(field.default_factory)
        try:
            return field.default_factory()
        except Exception:
            return ...
    return inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class _Made:
    """A default that a class makes without arguments."""

    kind: type

    def __repr__(self) -> str:
        return f"{self.kind.__name__}()"


def defaults_of(thing: Any) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each parameter."""
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        return {
            f.name: (f.type, _default(f)) for f in dataclasses.fields(thing)
        }
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return {}
    return {
        name: (p.annotation, p.default)
        for name, p in signature.parameters.items()
    }


def as_parameters(
    app: Sphinx,
    what: str,
    name: str,
    thing: Any,
    options: Any,
    lines: list[str],
) -> None:
    """Before napoleon reads a docstring: fields of what users make are its arguments."""
    del app, name, options
    if what in {"attribute", "data", "property"} and lines:
        lines[0] = lines[0].replace(
            ": ", COLON
        )  # which napoleon would take for a type
    if what != "class" or not is_made_by_users(thing):
        return
    for i, line in enumerate(lines):
        if line.strip() == "Attributes:":
            lines[i] = line.replace("Attributes:", "Args:")


def with_types(
    app: Sphinx,
    what: str,
    name: str,
    thing: Any,
    options: Any,
    lines: list[str],
) -> None:
    """After napoleon: the type of each parameter, and its default."""
    del app, name, options
    if lines:
        lines[0] = lines[0].replace(COLON, ": ")
    if what not in {"class", "function", "method", "exception"}:
        return
    known = defaults_of(thing)
    typed: list[str] = []
    answer = (
        getattr(thing, "__annotations__", {}).get("return")
        if what != "class"
        else None
    )
    taken = next(
        (
            line[len(":rtype: ") :]
            for line in lines
            if line.startswith(":rtype: ")
        ),
        None,
    )
    for line in lines:
        if line.startswith(":rtype:") and answer is not None:
            continue
        found = re.match(r":(?:param|ivar|vartype) (\w+):", line)
        if found and not line.startswith(":vartype") and found[1] in known:
            role = "type" if line.startswith(":param") else "vartype"
            kind = described(*known[found[1]])
            if kind:
                typed.append(f":{role} {found[1]}: {kind}")
        if line.startswith(":returns:") and answer is not None:
            typed.append(
                f":rtype: {described(answer, inspect.Parameter.empty)}"
            )
            if (
                taken is not None
            ):  # "Words: more", of which napoleon takes the words for a type
                line = line.replace(":returns:", f":returns: {taken}:", 1)
        typed.append(line)
    # A field list must not be torn: types stand before their own parameter, on a line each.
    lines[:] = typed


def described(annotation: Any, default: Any) -> str:
    """A type with its default, in words."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = linked(
        as_public(
            stringify_annotation(annotation, "fully-qualified-except-typing")
        )
    )
    if default is not inspect.Parameter.empty:
        shown = "..." if default is ... else as_public(_shown(default))
        text += f", default ``{shown}``" if shown else ""
    return text


def linked(annotation: str) -> str:
    """A type whose dotted names are links, of which the last part shows."""
    parts = re.split(r"([A-Za-z_][\w.]*)", annotation)
    for place, part in enumerate(parts):
        if place % 2 and "." in part:
            parts[place] = f":py:obj:`~{part}`"
    return "\\ ".join(part.replace("*", "\\*") for part in parts if part)


def _shown(default: Any) -> str:
    """How a default is written in code."""
    if inspect.isfunction(default):
        return default.__name__
    text = object_description(default)
    return "..." if "<" in text or len(text) > 60 else text


def setup(app: Sphinx) -> dict[str, bool]:
    """Napoleon listens at 500."""
    app.connect("autodoc-process-docstring", as_parameters, priority=400)
    app.connect("autodoc-process-docstring", with_types, priority=600)
    return {"parallel_read_safe": True}
