"""Options of a command line, made from the fields of settings; see `settings.setting`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

from applications.settings import Option

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Given(Generic[Settings]):
    """Settings that a command completes before it makes them.

    Attributes:
        kind: of the settings.
        values: what was written, by the name of the option; None where nothing was.
    """

    kind: type[Settings]
    values: Mapping[str, Any]

    def settings(self, **others: Any) -> Settings:
        """The settings.

        Args:
            others: fields that the command chooses, whatever was written.

        Returns:
            The settings; what was not written keeps its default.

        Raises:
            InputError: if something was written that does not fit.
        """
        return _made(self.kind, self.values, others)


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it.

    Args:
        function: some of its parameters are annotated by a dataclass of settings, or by `Given` of
            one, in `Annotated` with the title of its options in the help; all others as typer has
            them.

    Returns:
        A function with the options in the place of the settings, which makes them.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, tuple[Any, bool]] = {}
    for name, parameter in signature(function).parameters.items():
        kind, completed, panel = _group(hints[name])
        if kind is None:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY)
            )
        else:
            parameters += options_of(kind, panel)
            groups[name] = kind, completed

    def run(**arguments: Any) -> None:
        made = {}
        for name, (kind, completed) in groups.items():
            values = {one.name: arguments.pop(one.name) for one in options_of(kind)}
            made[name] = Given(kind, values) if completed else _made(kind, values, {})
        function(**arguments, **made)

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return run


def options_of(kind: type, panel: str | None = None, only: tuple[str, ...] = ()) -> list[Parameter]:
    """The options of a dataclass of settings, those of settings within it included.

    Args:
        kind: the dataclass.
        panel: title of the options in the help.
        only: names of the fields that are meant; none: all.

    Returns:
        Parameters, annotated as typer has them.
    """
    found: list[Parameter] = []
    for one, hint in _fields(kind, only):
        option = one.metadata.get("option")
        if option is not None:
            found.append(_parameter(one, hint, option, panel))
        elif is_dataclass(hint):
            found += options_of(hint, panel, one.metadata.get("only", ()))  # pyright: ignore[reportArgumentType]
    return found


def _group(hint: Any) -> tuple[Any, bool, str | None]:
    """The dataclass of settings, whether the command completes it, and the title; or Nones."""
    panel = None
    if get_origin(hint) is Annotated:
        hint, panel = get_args(hint)[:2]
    if get_origin(hint) is Given:
        return get_args(hint)[0], True, panel
    return (hint, False, panel) if is_dataclass(hint) else (None, False, None)


def _fields(kind: type, only: tuple[str, ...]) -> Iterator[tuple[Field, Any]]:
    hints = get_type_hints(kind)
    for one in fields(kind):  # pyright: ignore[reportArgumentType]
        if not only or one.name in only:
            yield one, hints[one.name]


def _parameter(one: Field, hint: Any, option: Option, panel: str | None) -> Parameter:
    name = option.name or one.name
    default = one.default if one.default_factory is MISSING else one.default_factory()
    if option.written is not None:
        hint, default = option.written.kind, option.written.default
        hint = hint | None if default is None else hint
    flag = f"--{name.replace('_', '-')}"
    if default is True:
        flag += f"/--no-{name.replace('_', '-')}"
    about = typer.Option(flag, help=option.text, min=option.least, rich_help_panel=panel)
    annotation = Annotated[hint, about]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _made(
    kind: type, values: Mapping[str, Any], others: Mapping[str, Any], only: tuple[str, ...] = ()
) -> Any:
    content = dict(others)
    for one, hint in _fields(kind, only):
        option = one.metadata.get("option")
        if one.name in others:
            continue
        if option is not None:
            value = values[option.name or one.name]
            if option.written is None:
                content[one.name] = value
            elif value is not None:
                content[one.name] = option.written.read(value)
        elif is_dataclass(hint) and options_of(hint):  # pyright: ignore[reportArgumentType]
            content[one.name] = _made(hint, values, {}, one.metadata.get("only", ()))  # pyright: ignore[reportArgumentType]
    return kind(**content)
