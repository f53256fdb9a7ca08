"""What the settings of both applications have in common."""

from enum import StrEnum

import bilevel as bl
from applications.errors import InputError


class Method(StrEnum):
    """How hypergradients are found."""

    IMPLICIT = "implicit"
    MLM = "mlm"
    UNROLLED = "unrolled"
    ONE_STEP = "one-step"

    @property
    def chosen(self) -> bl.HypergradientMethod:
        """The method of the library."""
        methods = {
            Method.IMPLICIT: bl.Implicit(bl.CG(rtol=1e-3)),
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


def check_positive(settings: object, *names: str) -> None:
    """Refuse fields that are not positive.

    Args:
        settings: a record.
        names: of its fields.

    Raises:
        InputError: naming the field.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} must be > 0, got {getattr(settings, name)}.")
