"""Records that print in a few lines: shapes, norms and verdicts instead of all their numbers."""

from dataclasses import fields
from textwrap import shorten, wrap
from typing import Any

from torch import Tensor

from bilevel import tree

WIDTH, LINES = 100, 5


class Record:
    """Base of the dataclasses, of `repr=False`, that solvers return: how they print."""

    def __repr__(self) -> str:
        """Each field in brief, five lines at most."""
        known = ((f.name, getattr(self, f.name)) for f in fields(self))  # pyright: ignore[reportArgumentType]
        parts = [f"{name}={brief(value)}" for name, value in known if value is not None]
        text = f"{type(self).__name__}({', '.join(parts)})"
        return "\n".join(
            wrap(text, WIDTH, subsequent_indent="  ", max_lines=LINES, placeholder=" ...")
        )


def brief(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, str):
        return repr(shorten(value, 150, placeholder=" ..."))
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "trustworthy"):
        return f"<{'' if value.trustworthy else 'not '}trustworthy, {value.error_estimate:.1e}>"
    if isinstance(value, list) and value and all(isinstance(x, float) for x in value):
        return f"[{len(value)} from {value[0]:.4g} to {value[-1]:.4g}]"
    if isinstance(value, list) and value and all(type(x) is int for x in value):
        return f"[{len(value)}, {sum(value)} in all]"
    if isinstance(value, list) and value and all(hasattr(x, "trustworthy") for x in value):
        return f"[{len(value)}, {sum(x.trustworthy for x in value)} trustworthy]"
    tensors = [x for x in tree.leaves_of(value) if isinstance(x, Tensor)]
    if isinstance(value, Tensor) and not value.ndim:
        return f"{value.item():.6g}" if tree.is_variable(value) else str(value.item())
    if tensors:
        size = f" of norm {tree.norm(value):.4g}" if any(map(tree.is_variable, tensors)) else ""
        if isinstance(value, Tensor):
            return f"{tree.kind(value)}{size}"
        return f"<{len(tensors)} tensors, {sum(x.numel() for x in tensors)} numbers{size}>"
    plain = isinstance(value, bool | int) or value == []
    return str(value) if plain else f"<{type(value).__name__}>"
