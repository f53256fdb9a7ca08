"""The rule that is equal to an optimiser of torch."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch.optim import Optimizer

from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.optim.adaptive import Adam, AdamW
from bilevel.optim.descent import SGD
from bilevel.optim.rules import InnerOptimizer

# Which of their settings ours have, under the same names.
TAKEN: dict[type[Optimizer], tuple[Callable[..., InnerOptimizer], tuple[str, ...]]] = {
    torch.optim.SGD: (SGD, ("lr", "momentum", "dampening", "weight_decay", "nesterov")),
    torch.optim.Adam: (Adam, ("lr", "betas", "eps", "weight_decay")),
    torch.optim.AdamW: (AdamW, ("lr", "betas", "eps", "weight_decay")),
}
# How it is computed, not what.
HOW = {"foreach", "fused", "capturable", "differentiable"}


def like(optimizer: type[Optimizer], **settings: Any) -> InnerOptimizer:
    """The rule that makes the steps of an optimiser of `torch.optim`, differentiable.

    Args:
        optimizer: the class, such as `torch.optim.AdamW`.
        **settings: what it would be made with; those left out are at the defaults of torch. Numbers
            may be functions of the control, as in the rules themselves.

    Returns:
        The rule.

    Raises:
        UnsupportedError: if there is no such rule, or not with these settings.
        ArgumentError: if it is no class of optimisers, or has no such setting.

    Example:
        >>> like(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
        AdamW(lr=0.1, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)
    """
    if isinstance(optimizer, Optimizer) or not (
        isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
    ):
        came = f"a {type(optimizer).__name__}" if isinstance(optimizer, Optimizer) else optimizer
        raise ArgumentError(
            f"optimizer must be a class such as torch.optim.AdamW, got {came}; its settings follow "
            "by name, as in like(torch.optim.SGD, lr=0.1)."
        )
    if optimizer not in TAKEN:
        raise UnsupportedError(
            f"there is no rule equal to {optimizer.__name__}: there are those of "
            f"{', '.join(kind.__name__ for kind in TAKEN)}; a rule of your own is a subclass of "
            "bilevel.optim.InnerOptimizer."
        )
    known = signature(optimizer).parameters
    unknown = [name for name in settings if name not in known or name == "params"]
    if unknown:
        names = ", ".join(name for name in known if name not in ("params", *HOW))
        raise ArgumentError(f"{optimizer.__name__} has no setting {unknown[0]}; it has {names}.")
    given = {name: parameter.default for name, parameter in known.items()} | settings
    make, taken = TAKEN[optimizer]
    if given.get("decoupled_weight_decay"):
        make = AdamW
    for name, value in given.items():
        left = name not in (*taken, *HOW, "params", "decoupled_weight_decay")
        if left and value not in (None, False):
            raise UnsupportedError(
                f"there is no rule equal to {optimizer.__name__} with {name}={value}; leave it out."
            )
    return make(**{name: given[name] for name in taken})
