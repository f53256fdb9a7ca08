r"""How task weights move: clipped gradient descent, as far as hypergradients agree.

.. math::
    d_p = \frac{\nabla F_p}{\max(|\nabla F_p|,\, c F_p)}, \qquad
    \alpha \leftarrow \alpha - \eta \max(0, \cos(d_p, d_{p-1}))\, d_p

A hypergradient is of a few slices and a few steps. Where some tasks do harm, hypergradients are
large and agree from one minibatch to the next, and a step has the length :math:`\eta`. Where all
tasks are equally good they are small, of any direction, and now and then out of scale, and weights
stay where they are. An optimiser that normalises gradients, such as Adam, follows both alike.

Clipping: Zhang, He, Sra & Jadbabaie 2020, Why gradient clipping accelerates training: a theoretical
justification for adaptivity, arXiv:1905.11881. Weights by cosines: Du et al. 2018, Adapting
auxiliary losses using gradient similarity, arXiv:1812.02224, there of two tasks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AgreeingDescent(torch.optim.Optimizer):
    """Descent in columns, each by its own gradients; the first step only looks.

    Args:
        parameters: vectors, or matrices of columns.
        lr: eta, the length of a step at most.
        clip: c, the norm of the gradient of a column relative to its share of the objective, from
            which on a step has that length.
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
                    x -= group["lr"] * self._direction(x, group["clip"] * abs(value))
        return value

    def _direction(self, x: Tensor, least: float) -> Tensor:
        norms = torch.linalg.vector_norm(x.grad, dim=0)
        clipped = x.grad / norms.clamp_min(max(least / norms.numel(), 1e-30))
        last, self.state[x]["last"] = self.state[x].get("last"), clipped
        if last is None:
            return torch.zeros_like(clipped)
        return torch.cosine_similarity(clipped, last, dim=0, eps=1e-30).clamp_min(0) * clipped
