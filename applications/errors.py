"""The errors a user of an application can mend; the command line prints them in one line."""

from bilevel.errors import BilevelError


class InputError(BilevelError, ValueError):
    """A file or a setting does not fit; the message names it, and the remedy."""


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
