"""Classifiers as plain functions of their parameters, and their fit by L-BFGS."""

from collections.abc import Mapping
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]


class Model(StrEnum):
    """What classifies."""

    LINEAR = "linear"
    MLP = "mlp"  # one hidden layer, ReLU


def start(
    model: Model, n_inputs: int, n_classes: int, hidden: int, generator: torch.Generator
) -> Params:
    """Parameters to begin with: zeros of a linear model, small random ones of a network.

    Args:
        model: which.
        n_inputs: pixels.
        n_classes: classes.
        hidden: units of the hidden layer; a linear model has none.
        generator: of the random ones.

    Returns:
        Weights of shape ``(outputs, inputs)`` and biases, float32.
    """
    if model == Model.LINEAR:
        return {"weight": torch.zeros(n_classes, n_inputs), "bias": torch.zeros(n_classes)}
    return {
        "hidden weight": torch.randn(hidden, n_inputs, generator=generator) * (2 / n_inputs) ** 0.5,
        "hidden bias": torch.zeros(hidden),
        "weight": torch.randn(n_classes, hidden, generator=generator) * hidden**-0.5,
        "bias": torch.zeros(n_classes),
    }


def logits(params: Params, inputs: Tensor) -> Tensor:
    """Outputs before the softmax, shape ``(n, classes)``."""
    if "hidden weight" in params:
        inputs = F.linear(inputs, params["hidden weight"], params["hidden bias"]).relu()
    return F.linear(inputs, params["weight"], params["bias"])


def losses(params: Params, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, shape ``(n,)``."""
    return F.cross_entropy(logits(params, inputs), labels, reduction="none")


def penalty(params: Params, decay: float) -> Tensor:
    """Weight decay: decay / 2 times the squared weights, without the biases."""
    squares = [x.square().sum() for name, x in params.items() if name.endswith("weight")]
    return decay / 2 * torch.stack(squares).sum()


def objective(
    params: Params, inputs: Tensor, labels: Tensor, shares: Tensor, decay: float
) -> Tensor:
    """Cross-entropies in the given shares, and weight decay."""
    return (shares * losses(params, inputs, labels)).sum() + penalty(params, decay)


def accuracy(params: Params, inputs: Tensor, labels: Tensor) -> float:
    """Share of samples that are classified right."""
    return float((logits(params, inputs).argmax(1) == labels).double().mean())


def fit(
    params: Params, inputs: Tensor, labels: Tensor, weights: Tensor, decay: float, steps: int = 150
) -> Params:
    """The minimiser of the weighted mean cross-entropy with weight decay, by L-BFGS.

    Args:
        params: to begin with; they are left as they are.
        inputs: shape ``(n, d)``.
        labels: shape ``(n,)``.
        weights: of the samples, shape ``(n,)``, >= 0; only their ratios matter.
        decay: of the weights of the model.
        steps: at most.

    Returns:
        Parameters, detached.
    """
    found = {name: x.clone().requires_grad_() for name, x in params.items()}
    kept = weights > 0
    inputs, labels, shares = inputs[kept], labels[kept], weights[kept] / weights.sum()
    lbfgs = torch.optim.LBFGS(
        list(found.values()),
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = objective(found, inputs, labels, shares, decay)
        value.backward()
        return value

    lbfgs.step(closure)
    return {name: x.detach() for name, x in found.items()}
