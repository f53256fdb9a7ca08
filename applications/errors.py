"""The errors that a user of an application can mend; the command line prints them in one line."""

from bilevel.errors import BilevelError


class InputError(BilevelError, ValueError):
    """A file or a setting does not fit; the message names it, and the remedy."""
