"""Settings that ride on a method's name, ``name:key=value,key=value``, into the fields of a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import InputError, unknown_name

T = TypeVar("T")
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse(kind: str, text: str, registry: Mapping[str, type[T]]) -> T:
    """Build the registered dataclass that `text` names, with its settings; `kind` is for the messages.

    Raises:
        InputError: for an unknown name, an unknown setting, or a value of the wrong type.
    """
    name, _, rest = text.partition(":")
    if name not in registry:
        raise unknown_name(kind, name, registry)
    cls = registry[name]
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in fields:
            raise unknown_name(f"setting of {name}", key, fields) if fields else InputError(f"{name} has no settings")
        if not equals:
            raise InputError(f"{kind} {name}: setting {key!r} has no value, write {key}=VALUE")
        values[key] = _convert(f"{kind} {name}: {key}", value, type(fields[key].default))
    return cls(**values)


def _convert(where: str, text: str, wanted: type) -> Any:
    try:
        return TRUTH[text.lower()] if wanted is bool else wanted(text)
    except (ValueError, KeyError):
        raise InputError(f"{where}={text!r} is no {wanted.__name__}") from None


def spell(name: str, value: Any) -> str:
    """The inverse of :func:`parse`: the name with every setting that has one, in field order."""
    pairs = [f"{field.name}={getattr(value, field.name)}" for field in dataclasses.fields(value)]
    return f"{name}:{','.join(pairs)}" if pairs else name
