"""What can go wrong, each under `BilevelError` and under the built-in it refines."""

from typing import Any


class BilevelError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        progress: where a `solve` that it ended had come to: a `Solution` or `ControlSolution` with
            the last finite control and the history so far. None elsewhere. Errors of other kinds
            that end a `solve`, `KeyboardInterrupt` among them, get the same attribute.
    """

    progress: Any = None


class ArgumentError(BilevelError, ValueError):
    """A setting or argument is outside what is allowed."""


class StructureError(BilevelError, ValueError):
    """Trees, shapes, dtypes or devices do not fit together."""


class LostGradientError(BilevelError, ValueError):
    """A gradient would be lost in silence: something unused, or something closed over."""


class UnsupportedError(BilevelError, NotImplementedError):
    """A combination this version does not compute; the message names one that works."""


class StorageError(BilevelError, OSError):
    """Snapshots could not be written or read; the message names the path."""


class ConvergenceError(BilevelError, RuntimeError):
    """An iteration stopped before its tolerance and the user asked for an error."""


class DivergenceError(BilevelError, ArithmeticError):
    """A value became infinite or NaN; the message names the step where it began."""


class ParallelError(BilevelError, RuntimeError):
    """A process of several failed, fell silent, or does not hold what the others hold."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped before its tolerance; the result says by how much."""


class CompileWarning(UserWarning):
    """A step could not be compiled, and runs uncompiled."""
