"""Nested dataclasses out of JSON, exactly: every field, no other, each of its declared type.

Nothing is converted but integers that stand for floats, so that a damaged or hand-edited file is
named instead of guessed at. Torch-free.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class OtherFields(ValueError):
    """Fields were added or removed since the JSON was written."""


def typed(kind: type[T], value: Any, where: str = "") -> T:
    """Build a value of type `kind` out of what json.loads() returned for it.

    Raises:
        OtherFields: naming a field that is unknown or missing.
        ValueError: if a value is of another type.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where.rstrip('.') or 'all of it'} is {value!r}")
        hints = typing.get_type_hints(kind)
        unknown, missing = set(value) - set(hints), set(hints) - set(value)
        if unknown:
            raise OtherFields(f"unknown setting {where}{min(unknown)}")
        if missing:
            raise OtherFields(f"missing setting {where}{min(missing)}")
        items = {name: typed(hints[name], value[name], f"{where}{name}.") for name in hints}
        return typing.cast(T, kind(**items))
    return typing.cast(T, _from_plain(kind, value, where.rstrip(".")))


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list) and len(value) == len(arguments):
            return tuple(_from_plain(k, v, where) for k, v in zip(arguments, value, strict=True))
    elif origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _from_plain(next(k for k in arguments if k is not type(None)), value, where)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r}")
