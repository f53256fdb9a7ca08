"""What can go wrong, each under `BilevelError` and under the built-in it refines."""

from typing import Any


class BilevelError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        progress: where a `solve` that it ended had come to: a `Solution` or `ControlSolution` with
            the last finite control and the history so far. None elsewhere. Errors of other kinds
            that end a `solve`, `KeyboardInterrupt` among them, get the same attribute.

    Example:
        >>> import bilevel as bl
        >>> try:
        ...     bl.BilevelSolver("no problem", bl.optim.SGD(0.1), inner_steps=5)
        ... except bl.BilevelError as error:
        ...     print(type(error).__name__)
        ArgumentError
    """

    progress: Any = None


class ArgumentError(BilevelError, ValueError):
    """A setting or argument is outside what is allowed.

    Example:
        >>> import bilevel as bl
        >>> try:
        ...     bl.optim.SGD(-0.1)
        ... except ArgumentError as error:
        ...     print(error)
        lr must be > 0 and finite, got -0.1.
    """


class StructureError(BilevelError, ValueError):
    """Trees, shapes, dtypes or devices do not fit together.

    Example:
        >>> import torch, bilevel as bl
        >>> model = torch.nn.Linear(2, 1)
        >>> try:
        ...     bl.functional(model)[1]({"weight": torch.zeros(1, 2)}, torch.zeros(3, 2))
        ... except StructureError as error:
        ...     print("bias" in str(error))
        True
    """


class LostGradientError(BilevelError, ValueError):
    """A gradient would be lost in silence: something unused, or something closed over.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - 1) ** 2,  # reads no a
        ...     outer=lambda w, a, batch: w**2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), inner_steps=5)
        >>> try:
        ...     solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        ... except LostGradientError:
        ...     print("the control has no influence")
        the control has no influence
    """


class UnsupportedError(BilevelError, NotImplementedError):
    """A combination this version does not compute; the message names one that works.

    Example:
        >>> import torch, bilevel as bl
        >>> try:
        ...     bl.optim.like(torch.optim.LBFGS)
        ... except UnsupportedError as error:
        ...     print(str(error).split(":")[0])
        there is no rule equal to LBFGS
    """


class StorageError(BilevelError, OSError):
    """Snapshots could not be written or read; the message names the path.

    Example:
        >>> import shutil, tempfile, torch, bilevel as bl
        >>> folder = tempfile.mkdtemp()
        >>> snapshots = bl.OnDisk(folder).open()
        >>> shutil.rmtree(folder)  # somebody cleans up
        >>> try:
        ...     snapshots.put(0, torch.zeros(3))
        ... except StorageError as error:
        ...     print(folder in str(error))
        True
    """


class ConvergenceError(BilevelError, RuntimeError):
    """An iteration stopped before its tolerance and the user asked for an error.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.01), inner_steps=2, on_failure="raise"
        ... )
        >>> try:
        ...     solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        ... except ConvergenceError:
        ...     print("two inner steps are not enough")
        two inner steps are not enough
    """


class DivergenceError(BilevelError, ArithmeticError):
    """A value became infinite or NaN; the message names the step where it began.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(1e9), inner_steps=20)
        >>> try:
        ...     solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        ... except DivergenceError:
        ...     print("the learning rate is too large")
        the learning rate is too large
    """


class ParallelError(BilevelError, RuntimeError):
    """A process of several failed, fell silent, or does not hold what the others hold.

    Example:
        >>> import bilevel as bl
        >>> def train(solver: bl.BilevelSolver, *arguments):  # under torchrun
        ...     try:
        ...         return solver.solve(*arguments)
        ...     except ParallelError as error:  # in every process
        ...         print(error)  # what failed, and where
        ...         raise
    """


class ConvergenceWarning(UserWarning):
    """An iteration stopped before its tolerance; the result says by how much.

    Example:
        >>> import warnings, torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.01), inner_steps=2)
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     found = solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        >>> seen[0].category.__name__, found.certificate.trustworthy
        ('ConvergenceWarning', False)
    """


class CompileWarning(UserWarning):
    """A step could not be compiled, and runs uncompiled.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("error", category=CompileWarning)  # rather stop
    """
