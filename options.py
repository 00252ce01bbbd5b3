"""Dataclasses as command line options: each field of a settings dataclass becomes a flag of its name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., Any])


def command(app: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command of `app`; a parameter annotated with a dataclass stands for all its fields.

    The function itself is returned unchanged, for callers in Python.
    """

    def register(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
        parameters = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in groups:
                parameters += _flags(groups[parameter.name])
            else:
                annotation = hints[parameter.name]
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=annotation))

        def call(**values: Any) -> Any:
            for group, cls in groups.items():
                values[group] = cls(**{field.name: values.pop(field.name) for field in dataclasses.fields(cls)})
            return function(**values)

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name)(call)
        return function

    return register


def _flags(cls: type) -> list[inspect.Parameter]:
    hints = get_type_hints(cls)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(help=field.metadata["help"])],
        )
        for field in dataclasses.fields(cls)
    ]
