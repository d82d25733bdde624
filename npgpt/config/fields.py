"""How a setting is declared and checked. This file knows no particular setting.

A configuration is a frozen dataclass that inherits from `Settings`. Each field is declared once, with its default, its
range and its help text. Making an object checks every field. The command-line flags come from the same declarations
(console/flags.py).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


class RequestError(ValueError):
    """A request cannot be fulfilled. The message says what was expected, what was given and what to do."""


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with a default, a help text and a range."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "choices": choices, "limits": {k: v for k, v in limits.items() if v is not None}}
    return field(default=default, metadata=metadata)


def required(help: str, **limits: Any) -> Any:
    """A dataclass field without a default."""
    return field(metadata=setting(None, help, **limits).metadata)


class Settings:
    """Base class of the configurations. Making an object checks the type and the range of every field."""

    def __post_init__(self) -> None:
        for f in fields_of(type(self)):
            value = getattr(self, f.name)
            if not (f.optional and value is None):
                object.__setattr__(self, f.name, f.check(value))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """The inverse of `dataclasses.asdict`. Raises RequestError for an unknown or a missing name."""
        fields = {f.name: f for f in fields_of(cls)}
        unknown = sorted(values.keys() - fields.keys(), key=str)
        if unknown:
            raise RequestError(f"{cls.__name__} has no setting {', '.join(repr(name)[:60] for name in unknown[:5])}")
        missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
        if missing:
            raise RequestError(f"{cls.__name__} needs {', '.join(missing)}")
        return cls(**values)


@dataclass(frozen=True)
class SettingField:
    """The declaration of one setting. `type` is int, float, bool or str; an optional setting may also be None."""

    name: str
    type: type
    optional: bool
    default: Any  # dataclasses.MISSING when there is none
    help: str
    choices: Sequence[str] | None
    limits: dict[str, float]

    def check(self, value: Any) -> Any:
        """Return the value as a plain int, float, bool or str.

        Raises RequestError when the value has another type or lies outside the range.
        """
        accepted, noun = _TYPES[self.type]
        valid = isinstance(value, accepted) and (self.type is bool or not isinstance(value, bool))
        if valid and self.type is float and isinstance(value, int) and abs(value) > 2**1023:
            valid = False  # float() would overflow
        if valid:
            value = self.type(value)
            valid = self.type is not float or math.isfinite(value)
        valid = valid and all(_LIMITS[name][0](value, limit) for name, limit in self.limits.items())
        valid = valid and (self.choices is None or value in self.choices)
        if not valid:
            if self.choices:
                noun = " or ".join(repr(c) for c in self.choices)
            wanted = " and ".join(f"{_LIMITS[name][1]} {limit:g}" for name, limit in self.limits.items())
            raise RequestError(f"{self.name} must be {noun}{' ' if wanted else ''}{wanted}, got {repr(value)[:60]}")
        return value


def fields_of(cls: type) -> Iterator[SettingField]:
    """The declarations of a configuration class, in their order."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        optional = isinstance(hint, types.UnionType)
        kind = typing.get_args(hint)[0] if optional else hint
        yield SettingField(f.name, kind, optional, f.default, **f.metadata)


_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}
# For each type of a setting: the values that are accepted, and the noun for messages.
_TYPES: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
}
