"""Whether a flag can have the value that it was given: its type, its choices, its range."""

import functools
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from enum import Enum
from numbers import Real
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

NoneType = type(None)
#: How messages call the types that are checked. A flag of any other type takes what its own code makes of it.
TYPE_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list"}
YAML_BOOLEANS = 'YAML reads no, off, yes and on as booleans: write "no" in quotes.'


class Limit(NamedTuple):
    """A range. Its ends belong to it, except infinity; NaN is in none."""

    low: float = 0
    high: float = math.inf
    above: bool = False  # low itself does not belong to it
    below: bool = False  # nor high

    def allows(self, value: float) -> bool:
        """Whether `value` is in the range."""
        is_above = value > self.low if self.above else value >= self.low
        is_below = value < self.high if self.below else value <= self.high
        return is_above and is_below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


COUNT, NOT_NEGATIVE, POSITIVE, SHARE = Limit(1), Limit(0), Limit(0, above=True), Limit(0, 1, below=True)


def check_ranges(args: Any, limits: Mapping[str, Limit]) -> None:
    """Raise `ValueError` for an attribute of `args` outside its limit. None, a flag that was not given, is inside."""
    for flag, limit in limits.items():
        value = getattr(args, flag, None)
        if value is not None and not limit.allows(value):
            raise ValueError(f"{flag}={value}: must be {limit}. Change it, or leave it out for its default.")


def check_types(args: Any, cls: type, names: Iterable[str] | None = None) -> None:
    """Raise `ValueError` for an attribute of `args` whose type or choices are not those of the dataclass `cls`.

    A boolean is no number, though Python has it so, and a string is none either.

    Args:
        names: of the fields to look at. Default: those that `cls` adds to its parents.
    """
    hints = _hints(cls)
    names = set(cls.__annotations__ if names is None else names)
    for field in fields(cls):
        if field.name in names and hasattr(args, field.name):
            _check(field, getattr(args, field.name), hints[field.name])


def refuse_booleans(args: Any, cls: type) -> None:
    """Raise `ValueError` where `cls` has a number and `args` a boolean."""
    numeric = [name for name, hint in _hints(cls).items() if _kinds(hint) <= {int, float, NoneType}]
    check_types(args, cls, [name for name in numeric if isinstance(getattr(args, name, None), bool)])


def refuse_nan(args: Any, cls: type) -> None:
    """Raise `ValueError` where `args` has NaN for a number of `cls`."""
    for field in fields(cls):
        value = getattr(args, field.name, None)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{field.name}={value}: give a number. NaN is none.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of the fields as they were written: HfArgumentParser changes those that the fields have."""
    return get_type_hints(cls)


def _check(field: Field, value: Any, hint: Any) -> None:
    kinds, choices = _kinds(hint), field.metadata.get("choices")
    if value is None and (field.default is None or NoneType in kinds):
        return
    if choices is not None:
        if getattr(value, "value", value) not in choices:
            raise ValueError(f"{field.name}={value!r}: choose one of {', '.join(map(str, choices))}.")
    elif not any(_is(value, kind) for kind in kinds):
        expected = _in_words(kinds)
        remedy = f" {YAML_BOOLEANS}" if isinstance(value, bool) and not kinds & {int, float} else ""
        raise ValueError(f"{field.name}={value!r}: give {expected}, not a {type(value).__name__}.{remedy}")


def _kinds(hint: Any) -> set[Any]:
    """The types of an annotation. Next to an enumeration a string is only a name of its members."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = {get_origin(kind) or kind for kind in kinds}
    return kinds - {str} if any(map(_is_enumeration, kinds)) else kinds


def _is_enumeration(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return is_number and (kind is float or float(value).is_integer())
    if kind is list:
        return isinstance(value, list | tuple)
    if _is_enumeration(kind):
        return getattr(value, "value", value) in {member.value for member in kind}
    return isinstance(value, kind) if kind in TYPE_NAMES else kind is not NoneType


def _in_words(kinds: set[Any]) -> str:
    words = [
        " or ".join(member.value for member in kind) if _is_enumeration(kind) else TYPE_NAMES[kind]
        for kind in kinds - {NoneType}
    ]
    return " or ".join(sorted(words))
