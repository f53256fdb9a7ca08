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

    def plot(self) -> Any:
        """A heat map, one row a training task, with the weights written in the cells.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            UnsupportedError: if matplotlib is not installed.
        """
        n, m = self.matrix.shape
        values = self.matrix.cpu().tolist()
        figure = new_figure(
            2.2 + 0.7 * m, 1.2 + 0.4 * n, name="Correlation.plot", instead=".matrix"
        )
        axes = figure.add_subplot()
        largest = max(max(row) for row in values)
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if value > 0.6 * largest else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        turned = max(map(len, self.validations)) > 6
        axes.set_xticks(range(m), self.validations, rotation=30 if turned else 0)
        axes.set_yticks(range(n), self.tasks)
        axes.set(xlabel="validation task", ylabel="training task")
        figure.colorbar(image, label="weight")
        return figure
