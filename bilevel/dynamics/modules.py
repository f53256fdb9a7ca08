"""`torch.nn.Module`s as dynamics and as plain functions of their parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import tree
from bilevel.checks import check_kind
from bilevel.dynamics.closures import refuse_wrapped
from bilevel.dynamics.dynamics import Dynamics
from bilevel.dynamics.per_step import PerStep, check_control
from bilevel.errors import ArgumentError, StructureError
from bilevel.tree import Tree

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class ModuleFunction:
    """A module as a plain function; see `functional`.

    Attributes:
        model: the module; it is not modified.
        constants: names of what a call takes from the module as it is: frozen parameters.
        cloned: names of the buffers, which every call gets as copies, so that it leaves the
            module's own as they are: a BatchNorm layer normalises by them or by the batch, as its
            mode says, and never updates them.
        shapes: of the parameters that a call needs, by name.

    Example:
        >>> import torch, bilevel as bl
        >>> params, call = bl.functional(torch.nn.Linear(2, 1))
        >>> type(call).__name__, call(params, torch.ones(3, 2)).shape
        ('ModuleFunction', torch.Size([3, 1]))
    """

    model: nn.Module
    constants: tuple[str, ...] = ()
    cloned: tuple[str, ...] = ()
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)

    def __call__(self, params: Params, *inputs: Any, **options: Any) -> Any:
        """Call the module with these parameters.

        Args:
            params: as `functional` gave them; a frozen parameter or a buffer may be among them.
            *inputs: of the module, by place.
            **options: of the module, by name.

        Returns:
            What the module gives.

        Raises:
            StructureError: if the parameters are not those of the module, by name and shape.
        """
        self._check(params)
        return _call(self.model, params, *inputs, **options)

    def __repr__(self) -> str:
        """The module, what is constant, and what draws."""
        dropping = [
            f"{name or 'itself'} ({type(part).__name__})"
            for name, part in self.model.named_modules()
            if part.training and _drops(part)
        ]
        listed = [
            f"{name} {', '.join(names)}"
            for name, names in (
                ("constant:", self.constants),
                ("buffers, cloned:", self.cloned),
                ("in training mode, drawing:", dropping),
            )
            if names
        ]
        return f"ModuleFunction({type(self.model).__name__}{''.join(f'; {one}' for one in listed)})"

    def _check(self, params: Any) -> None:
        """Refuse what is no tree of its parameters: a control in their place, a list, a module."""
        if not isinstance(params, Mapping):
            raise StructureError(
                "a module as a function is called as call(params, *inputs), with params by name as "
                f"functional(model) gave them, got {tree.kind(params)}."
            )
        missing = [name for name in self.shapes if name not in params]
        if missing:
            raise StructureError(
                f"params must have a tensor for {missing[0]!r}, got {', '.join(params) or 'none'}: "
                "freeze with requires_grad_(False), before functional(model), what is constant."
            )
        for name, shape in self.shapes.items():
            if params[name].shape != shape:
                raise StructureError(
                    f"params[{name!r}] must have the shape {tuple(shape)} of the module's "
                    f"parameter, got {tuple(params[name].shape)}: are params and control swapped?"
                )


def functional(model: nn.Module) -> tuple[Params, ModuleFunction]:
    """`model` as a plain function of its parameters.

    Frozen parameters (`requires_grad` False) and buffers are constants; buffers are cloned for each
    call, so that a BatchNorm layer cannot change them in silence. The function prints which.

    Args:
        model: any module; it is not modified.

    Returns:
        `(params, call)`: the trainable parameters by name, detached copies, and
        `call(params, *inputs, **options)`.

    Raises:
        ArgumentError: if it is no module.
        UnsupportedError: if it, or a part of it, is wrapped to train over several processes.

    Example:
        >>> params, call = functional(nn.Linear(2, 1, bias=False))
        >>> call({"weight": torch.ones(1, 2)}, torch.tensor([3.0, 4.0]))
        tensor([7.])
        >>> functional(nn.BatchNorm1d(3, affine=False))[1]
        ModuleFunction(BatchNorm1d; buffers, cloned: running_mean, running_var, num_batches_tracked)
    """
    check_kind(model, nn.Module, "model", "a torch.nn.Module")
    refuse_wrapped(model)
    params = _trainable(model)
    return params, ModuleFunction(
        model,
        tuple(n for n, p in model.named_parameters() if not p.requires_grad),
        tuple(n for n, _ in model.named_buffers()),
        {name: value.shape for name, value in params.items()},
    )


def _drops(part: nn.Module) -> bool:
    """Whether it is a dropout, or has one inside, as attention and recurrent layers have."""
    dropout = isinstance(part, nn.modules.dropout._DropoutNd)
    rate = getattr(part, "p" if dropout else "dropout", 0.0)
    return isinstance(rate, float | int) and rate > 0


def _call(model: nn.Module, params: Params, *inputs: Any, **options: Any) -> Any:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return torch.func.functional_call(model, {**buffers, **params}, inputs, options)


def _trainable(model: nn.Module) -> Params:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Phases(Dynamics):
    """Modules as a dynamics: step t is `modules[t-1](state, *context)`, with unshared parameters.

    Attributes:
        modules: one per step.
        initial: u(0) = `initial(observation)`; None makes the observation u(0).
        context: further inputs of every step, constant for the sample.

    Raises:
        ArgumentError: if two steps, or a step and `initial`, hold the same parameter, which
            `controls` could not keep equal.
        UnsupportedError: if one is wrapped to train over several processes.

    Example:
        >>> net = Phases([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> len(net.controls().steps)
        2
    """

    modules: Sequence[nn.Module]
    initial: nn.Module | None = None
    context: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Check that no parameter is shared between steps."""
        object.__setattr__(self, "modules", tuple(self.modules))
        owner: dict[int, str] = {}
        named = [(f"step {t}", module) for t, module in enumerate(self.modules, start=1)]
        for holder, module in named + ([] if self.initial is None else [("initial", self.initial)]):
            refuse_wrapped(module)
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                first = owner.setdefault(id(parameter), holder)
                if first != holder:
                    raise ArgumentError(
                        f"{first} and {holder} share the parameter {name!r}, but Phases gives "
                        "each its own: for one network at every step use bilevel.functional "
                        "and bilevel.Map with a shared control."
                    )

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        return _call(self.modules[t - 1], control, state, *self.context)

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        if self.initial is None:
            return observation
        return _call(self.initial, control, observation)

    @property
    def origin(self) -> object:  # noqa: D102
        return self.modules[0] if self.modules else self

    def controls(self) -> PerStep:
        """Detached copies of the trainable parameters, as a control."""
        return PerStep(
            [_trainable(module) for module in self.modules],
            initial=None if self.initial is None else _trainable(self.initial),
        )

    def load(self, control: PerStep) -> None:
        """Copy a control into the modules' parameters.

        Args:
            control: as `controls` returns it.

        Raises:
            StructureError: if names, shapes or dtypes differ from the modules'; then nothing is
                copied.
        """
        check_control(control, len(self.modules))
        tree.check_like(
            control, self.controls(), "control", "load takes a control as controls() makes it"
        )
        pairs = [*zip(self.modules, control.steps, strict=True)]
        if self.initial is not None:
            pairs.append((self.initial, control.initial))
        for module, values in pairs:
            _copied_into(module, values)


def load_into(model: nn.Module, values: Tree, name: str) -> None:
    """Copy parameters, as `functional` gave them, into a module.

    Args:
        model: with parameters of the same names, shapes and dtypes; frozen ones and buffers stay.
        values: by name.
        name: what they are, for an error.

    Raises:
        StructureError: if names, shapes or dtypes differ; then nothing is copied.
    """
    tree.check_like(
        values, _trainable(model), name, "load_into takes the trainable parameters of the model"
    )
    _copied_into(model, values)


def _copied_into(model: nn.Module, values: Params) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
