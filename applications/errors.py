"""The errors that a user of an application can mend, told in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bilevel.errors import BilevelError

_LONGEST = 2000  # characters of a message


class InputError(BilevelError, ValueError):
    """A file or a setting does not fit; the message names it, and the remedy."""

    def __init__(self, message: str) -> None:
        """Say so; what a file makes endless is cut."""
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """End the program where a package is missing: one line that names the extra, exit code 2.

    Args:
        extra: of `bilevel` that brings what is imported.

    Yields:
        Nothing.

    Raises:
        ModuleNotFoundError: if what is missing is a module of this project.
        SystemExit: with exit code 2, if it is another.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "applications", "bilevel"):
            raise
        sys.stderr.write(
            f"error: the package {package} is needed and not installed; "
            f'pip install "bilevel[{extra}]".\n'
        )
        raise SystemExit(2) from None
