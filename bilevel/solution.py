"""What a bilevel solver returns."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bilevel.certificates.certificate import Certificate
from bilevel.drawing import new_figure
from bilevel.dynamics.modules import load_into
from bilevel.linear.operator import LinearResult
from bilevel.methods.base import Truncation
from bilevel.methods.instance import Warm
from bilevel.records import Record
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False, repr=False)
class Hypergradient(Record):
    """A hypergradient and how far it can be trusted; everything detached.

    So `value` inside an objective or a loss of one's own is a constant there, and hands no gradient
    on; what does is `gradient`, as in ``control.backward(found.gradient)``.

    Attributes:
        value: F at the inner solution that was reached, real scalar.
        gradient: dF/dalpha, the structure of the control, None for leaves without gradient.
        params: the inner solution that was reached.
        certificate: None if it was switched off.
        warm: what the next hypergradient may start from.
        linear: how the linear system was solved; None where the method has none.
        truncation: what the method left out; None if nothing.
        flaw: why it is not that of the problem, whatever it is judged against; empty if nothing
            speaks against it.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,  # w(a) = a
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        >>> found.value, found.gradient, found.params  # (a - 1)^2, 2 (a - 1) and a
        (tensor(4.), tensor(4.), tensor(3.))
        >>> found.certificate.trustworthy
        True
    """

    value: Tensor
    gradient: Tree
    params: Tree
    certificate: Certificate | None
    warm: Warm
    linear: LinearResult | None
    truncation: Truncation | None
    flaw: str = ""

    @property
    def complaint(self) -> str | None:
        """Why it should not be trusted as it is; None if nothing speaks against it."""
        if self.certificate is not None:
            return None if self.certificate.trustworthy else str(self.certificate)
        if self.flaw:
            return self.flaw
        return self.linear.message if self.linear and not self.linear.converged else None


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Record):
    """The control found, and how.

    Attributes:
        control: the last control, detached.
        params: the inner solution at the last hypergradient.
        value: F there.
        gradient_norm: of the last hypergradient.
        hypergradient: the last one: at the last control or, with batches, before the last update;
            None if there was none.
        values: F before each update.
        gradient_norms: of the hypergradient before each update.
        certificates: of the hypergradients before each update, and of one whose norm was within the
            tolerance; without what they hold of the control's size, which the last hypergradient
            has. Empty if they are switched off.
        steps: updates made.
        converged: whether the norm of the hypergradient came down to the tolerance, and its
            certificate trusted it, or nobody judged it.
        reason: why it ended, in words; of a converged one, which of the two.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,  # w(a) = a
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> descent = lambda leaves: torch.optim.SGD(leaves, 0.25)
        >>> found = solver.solve(torch.tensor(0.0), torch.tensor(3.0), descent, steps=3)
        >>> found.control, found.values  # a - 1 is halved by each update
        (tensor(1.2500), [4.0, 1.0, 0.25])
    """

    control: Tree
    params: Tree
    value: float
    gradient_norm: float
    hypergradient: Hypergradient | None
    values: list[float]
    gradient_norms: list[float]
    certificates: list[Certificate]
    steps: int
    converged: bool
    reason: str

    @property
    def warm(self) -> Warm | None:
        """Where the inner iteration came to, for a `solve` that goes on; None if none was made."""
        return None if self.hypergradient is None else self.hypergradient.warm

    def load_into(self, model: nn.Module) -> None:
        """Copy the inner solution, params of `functional(model)`, into the model.

        Args:
            model: whose parameters they are; frozen ones and buffers stay.

        Raises:
            StructureError: if names, shapes or dtypes differ; then nothing is copied.
        """
        load_into(model, self.params, "params")

    def plot(self) -> Any:
        """Outer objective, norm of the hypergradient and its estimated error over the updates.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            UnsupportedError: if matplotlib is not installed.
        """
        errors = [certificate.error_estimate for certificate in self.certificates]
        shown = {
            "outer objective": (self.values, "linear"),
            "norm of the hypergradient": (self.gradient_norms, "log"),
            **({"estimated relative error": (errors, "log")} if errors else {}),
        }
        figure = new_figure(
            4 * len(shown),
            3,
            name="Solution.plot",
            instead=".values, .gradient_norms and .certificates",
        )
        for place, (name, (numbers, scale)) in enumerate(shown.items(), 1):
            axes = figure.add_subplot(1, len(shown), place)
            axes.plot(range(1, len(numbers) + 1), numbers)
            axes.set(xlabel="update", title=name)
            if any(0 < x < math.inf for x in numbers):
                axes.set_yscale(scale)
        return figure
