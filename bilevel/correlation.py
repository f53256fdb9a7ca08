"""The learned correlation of training and validation tasks, as numbers and as a picture."""

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel.drawing import new_figure


@final
@dataclass(frozen=True, eq=False)
class Correlation:
    """Weights of training tasks for validation tasks.

    Attributes:
        matrix: shape ``(N, M)``, columns of sum 1.
        tasks: names of the rows.
        validations: names of the columns.
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
