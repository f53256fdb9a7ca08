r"""How task weights move: gradient descent with clipping.

.. math::
    \alpha \leftarrow \alpha - \eta\, \frac{\nabla F}{\max(|\nabla F|,\, c F)}

The more the gradient promises, relative to the objective, the longer is the step, up to the length
:math:`\eta`. Where some tasks do harm, hypergradients are large and agree from one minibatch to the
next; where all are equally good they are small and of any sign, and weights stay where they are. An
optimiser that normalises gradients, such as Adam, follows both at the same speed, and one that is
out of scale slows it for long.

Clipping: Zhang, He, Sra & Jadbabaie 2020, Why gradient clipping accelerates training: a theoretical
justification for adaptivity, arXiv:1905.11881.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class ClippedDescent(torch.optim.Optimizer):
    """Descent in columns, none of whose steps is longer than the learning rate.

    Args:
        parameters: vectors, or matrices whose columns are clipped one by one.
        lr: length of a step at most.
        clip: norm of the gradient of a column, relative to its share of the objective, from which
            on the step has that length.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, clip: float) -> None:
        """Take the settings."""
        super().__init__(parameters, {"lr": lr, "clip": clip})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the objective and its gradient.

        Returns:
            The objective before the step.
        """
        assert closure is not None  # the objective is needed, and solvers give it
        value = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for x in group["params"]:
                    norms = torch.linalg.vector_norm(x.grad, dim=0)
                    least = group["clip"] * abs(value) / norms.numel()
                    x -= group["lr"] * x.grad / norms.clamp_min(max(least, 1e-30))
        return value
