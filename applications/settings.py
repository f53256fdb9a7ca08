"""What the settings of both applications have in common: checks, and fields that are options.

A field made by `setting` says how it is given on the command line, from which
`applications.options` makes the options, so that defaults and help texts stand in one place.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from typing import Any

import bilevel as bl
from applications.errors import InputError


@dataclass(frozen=True)
class Written:
    """A field that is written on the command line as something else.

    Attributes:
        kind: type of what is written.
        default: as it is written; None leaves the field its default.
        read: makes the field of what is written; it raises InputError where that is wrong.
    """

    kind: Any
    default: Any
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Option:
    """How a field is given on the command line.

    Attributes:
        text: what it is, for the help.
        name: there, if it is not that of the field.
        least: smallest value, or None.
        written: what is written, if it is not the value of the field.
    """

    text: str
    name: str | None = None
    least: float | None = None
    written: Written | None = None


def setting(
    default: Any,
    text: str,
    *,
    name: str | None = None,
    least: float | None = None,
    written: Written | None = None,
) -> Any:
    """A field of a dataclass of settings that is an option of the command line, too.

    Args:
        default: of the field; a class or function makes one.
        text: what it is, for the help.
        name: on the command line, if it is not that of the field.
        least: smallest value that the command line takes.
        written: what is written there, if it is not the value of the field.

    Returns:
        The field.
    """
    metadata = {"option": Option(text, name, least, written)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def only(*names: str) -> Any:
    """A field of settings of which only some fields are options, by their names."""
    return field(default=MISSING, metadata={"only": names})


def chosen_by_name(option: str, known: Mapping[str, Callable[[], Any]], default: str) -> Written:
    """A field that is written as one of some names.

    Args:
        option: what messages call it.
        known: makes the value, by name.
        default: one of the names.

    Returns:
        How it is written.
    """

    def read(name: str) -> Any:
        if name not in known:
            raise InputError(f"{option} must be one of {', '.join(known)}, got {name!r}.")
        return known[name]()

    return Written(str, default, read)


class Method(StrEnum):
    """How hypergradients are found."""

    IMPLICIT = "implicit"
    MLM = "mlm"
    UNROLLED = "unrolled"
    ONE_STEP = "one-step"

    @property
    def chosen(self) -> bl.methods.HypergradientMethod:
        """The method of the library."""
        methods = {
            Method.IMPLICIT: bl.Implicit(bl.linear.CG(rtol=1e-3)),
            Method.MLM: bl.MLM(),
            Method.UNROLLED: bl.Unrolled(),
            Method.ONE_STEP: bl.OneStep(),
        }
        return methods[self]


def check_counts(settings: object, *names: str) -> None:
    """Refuse fields that are less than 1.

    Args:
        settings: a record.
        names: of its fields.

    Raises:
        InputError: naming the field.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(settings, name)}.")


MOST_RATE = 1e30  # of learning: beyond it steps have no number in float32


def check_positive(settings: object, *names: str, most: float = math.inf) -> None:
    """Refuse fields that are not positive.

    Args:
        settings: a record.
        names: of its fields.
        most: that they may be.

    Raises:
        InputError: naming the field.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} must be > 0, got {getattr(settings, name)}.")
        if getattr(settings, name) == math.inf:
            raise InputError(f"{name} must be finite, got inf.")
        if getattr(settings, name) > most:
            raise InputError(f"{name} must be at most {most:g}, got {getattr(settings, name)}.")
