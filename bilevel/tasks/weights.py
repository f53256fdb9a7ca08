"""Weights of training tasks as a function of the outer variable, and what they say of the tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind, check_range, check_whole
from bilevel.drawing import new_figure
from bilevel.errors import StructureError
from bilevel.tasks.normalisers import Normaliser, Softmax
from bilevel.tree import Tree


@final
@dataclass(frozen=True, eq=False)
class Correlation:
    """Weights of training tasks for validation tasks.

    Attributes:
        matrix: shape ``(N, M)``, columns of sum 1.
        tasks: names of the rows.
        validations: names of the columns.

    Example:
        >>> import torch, bilevel as bl
        >>> weights = bl.TaskWeights(n_tasks=2, n_validations=2)
        >>> found = weights.correlation(weights.initial(), ["a", "b"])
        >>> found.tasks, found.matrix
        (('a', 'b'), tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]]))
    """

    matrix: Tensor
    tasks: tuple[str, ...]
    validations: tuple[str, ...]

    def plot(self, axes: Any = None, largest: float | None = None) -> Any:
        """A heat map, one row a training task, with the weights written in the cells.

        A matrix with negative entries, such as one of gains, is coloured around 0.

        Args:
            axes: of matplotlib, to draw in; None makes a figure, with a bar of the colours.
            largest: magnitude of the strongest colour; None is the largest one of the matrix.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            UnsupportedError: if matplotlib is not installed.
        """
        n, m = self.matrix.shape
        values = self.matrix.cpu().tolist()
        place = axes
        if place is None:
            width, height = 2.2 + 0.7 * m, 1.2 + 0.4 * n
            figure = new_figure(width, height, name="Correlation.plot", instead=".matrix")
            place = figure.add_subplot()
        signed = min(map(min, values)) < 0
        end = largest or max(abs(value) for row in values for value in row) or 1.0
        colours = "RdBu" if signed else "Blues"
        image = place.imshow(values, cmap=colours, vmin=-end * signed, vmax=end, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 * end else "black"
                text = f"{value:+.2f}" if signed else f"{value:.2f}"
                place.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
        place.set_xticks(range(m), self.validations)
        if max(map(len, self.validations)) > 6:
            place.tick_params("x", rotation=30)
        place.set_yticks(range(n), self.tasks)
        place.set(xlabel="validation task", ylabel="training task")
        if axes is None:
            place.figure.colorbar(image, label="weight")
        return place.figure


@final
@dataclass(frozen=True)
class TaskWeights:
    r"""sigma(alpha): from unconstrained numbers to weights of training tasks.

    .. math:: \sigma = \mathrm{floor} + (1 - N\, \mathrm{floor})\, \sigma_0(\alpha)

    Attributes:
        n_tasks: number N of training tasks.
        n_validations: number M of validation tasks that get a column of weights each; None makes
            alpha a vector.
        normalise: sigma_0.
        floor: least weight of a task, in [0, 1/N]; above 0 no task leaves the training.
        entropy: the outer loss is lowered by this times the entropy of the weights, against
            collapse to one task.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> weights = TaskWeights(n_tasks=2, floor=0.1)
        >>> weights.sigma(torch.tensor([100.0, 0.0]))
        tensor([0.9000, 0.1000])
    """

    n_tasks: int
    n_validations: int | None = None
    normalise: Normaliser = field(default_factory=Softmax)
    floor: float = 0.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        check_whole(self.n_tasks, "n_tasks", 1, advice="give at least one task")
        check_whole(self.n_validations, "n_validations", 1, optional=True)
        kinds = "Softmax(), Sparsemax() or another Normaliser"
        check_kind(self.normalise, Normaliser, "normalise", kinds)
        check_range(self.floor, "floor", least=0, most=1 / self.n_tasks)
        check_range(self.entropy, "entropy", least=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of alpha: ``(N,)`` or ``(N, M)``."""
        return (self.n_tasks,) if self.n_validations is None else (self.n_tasks, self.n_validations)

    def initial(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Alpha of equal weights: zeros."""
        return torch.zeros(self.shape, dtype=dtype, device=device)

    def stacked(self, params: Tree) -> Tree:
        """Params for every column: copies along a leading axis of length M, or as they are.

        Args:
            params: of one model.

        Returns:
            Floating-point and complex leaves of shape ``(M, *shape)``; for a vector, `params`.
        """
        if self.n_validations is None:
            return params
        m = self.n_validations
        return tree.map_leaves(
            lambda x: x.detach().expand(m, *x.shape).clone() if tree.is_variable(x) else x, params
        )

    def sigma(self, alpha: Tensor) -> Tensor:
        """The weights.

        Args:
            alpha: shape ``(N,)`` or ``(N, M)``.

        Returns:
            Like `alpha`; each column sums to 1.

        Raises:
            StructureError: if alpha has another shape or is not real.
        """
        if (
            not isinstance(alpha, Tensor)
            or alpha.shape != self.shape
            or not alpha.is_floating_point()
        ):
            raise StructureError(
                f"alpha must be a real tensor of shape {self.shape}, got {tree.kind(alpha)}; "
                "TaskWeights.initial() makes one."
            )
        sigma = self.normalise(alpha)
        return self.floor + (1 - self.n_tasks * self.floor) * sigma if self.floor else sigma

    def spread(self, sigma: Tensor) -> Tensor:
        """Entropy of weights, summed over the columns; log N a column where they are equal."""
        positive = sigma > 0
        return -torch.where(positive, sigma * torch.where(positive, sigma, 1).log(), 0).sum()

    def correlation(
        self,
        alpha: Tensor,
        tasks: Sequence[str] | None = None,
        validations: Sequence[str] | None = None,
    ) -> Correlation:
        """The learned correlation of training and validation tasks.

        Args:
            alpha: shape ``(N,)`` or ``(N, M)``.
            tasks: names of the training tasks.
            validations: names of the validation tasks; of a vector, one name for all.

        Returns:
            The matrix sigma(alpha) with its labels.

        Raises:
            StructureError: if alpha or the number of names does not fit.
        """
        matrix = self.sigma(alpha).detach().reshape(self.n_tasks, -1)
        m = matrix.shape[1]
        rows = [f"task {i + 1}" for i in range(self.n_tasks)] if tasks is None else list(tasks)
        if validations is None:
            columns = ["all"] if self.n_validations is None else [f"{j + 1}" for j in range(m)]
        else:
            columns = list(validations)
        for name, found, needed in (
            ("tasks", rows, self.n_tasks),
            ("validations", columns, m),
        ):
            if len(found) != needed:
                raise StructureError(f"{name} must be {needed} names, got {len(found)}.")
        return Correlation(matrix, tuple(rows), tuple(columns))
