"""Whether a flag's value has an allowed type, choice or range, and whether it has an effect.

`flag` puts the choices or the range of a flag into the field's metadata, and `check_fields` checks them. A table of
`Needs` lists the flags that have an effect only with others, and `without_effect` checks that.
"""

import functools
import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import Field, field, fields
from enum import Enum
from numbers import Real
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

NoneType = type(None)
#: Names of the checked types in messages. Values of other types are checked by the code that uses them.
TYPE_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list"}
YAML_BOOLEANS = 'YAML reads no, off, yes and on as booleans: write "no" in quotes.'


class Limit(NamedTuple):
    """A range. It includes its ends, except infinity; NaN is in none."""

    low: float = 0
    high: float = math.inf
    above: bool = False  # excludes low itself
    below: bool = False  # excludes high itself
    off: float | None = None  # allowed wherever it lies
    whole_from: float = math.inf  # from here on only whole numbers are allowed
    rule: str = ""  # replaces "must be at least ..." in the message

    def allows(self, value: float) -> bool:
        """Whether `value` is in the range."""
        if value == self.off:
            return True
        is_above = value > self.low if self.above else value >= self.low
        is_below = value < self.high if self.below else value <= self.high
        is_in = is_above and is_below and math.isfinite(value)
        return is_in and (value < self.whole_from or value == int(value))

    def __str__(self) -> str:
        if self.rule:
            return self.rule
        low = f"must be {'more than' if self.above else 'at least'} {self.low:g}"
        high = "" if self.high == math.inf else f" and {'below' if self.below else 'at most'} {self.high:g}"
        return f"{low}{high}. Change it, or leave it out for its default."


COUNT, NOT_NEGATIVE, POSITIVE, SHARE = Limit(1), Limit(0), Limit(0, above=True), Limit(0, 1, below=True)
PROBABILITY, POSITIVE_SHARE = Limit(0, 1), Limit(0, 1, above=True)
#: A number of optimizer steps, or a share of all of them.
STEPS = Limit(0, whole_from=1, rule="give a whole number of steps, or a fraction of all steps below 1.")


class _Metadata(Mapping):
    """The metadata of a flag. `HfArgumentParser` passes every key it iterates over to argparse: `help` and
    `choices`, but not `limit`, which can only be looked up.

    Choices may be a table of entries that describe themselves. The help then ends with their descriptions, including
    those of entries that were added after the field was made.
    """

    def __init__(self, **entries: Any):
        self._entries = {name: value for name, value in entries.items() if value is not None}

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._entries if name != "limit")

    def __len__(self) -> int:
        return len(list(iter(self)))

    def copy(self) -> dict[str, Any]:
        """What is iterated over; `HfArgumentParser` of transformers 5.18 asks for a copy."""
        return dict(self)

    def __getitem__(self, name: str) -> Any:
        value = self._entries[name]
        if name == "help" and isinstance(choices := self._entries.get("choices"), Mapping):
            about = [f"{key}: {entry.help}" for key, entry in choices.items() if getattr(entry, "help", None)]
            value = " ".join([value, *(["; ".join(about) + "."] if about else [])])
        return value


def flag(default: Any, help: str, allowed: Limit | Collection[Any] | None = None) -> Any:
    """The field of a flag.

    Args:
        allowed: its range or its choices. Choices may be a table whose entries have a `help` of their own.
    """
    is_limit = isinstance(allowed, Limit)
    metadata = _Metadata(help=help, choices=None if is_limit else allowed, limit=allowed if is_limit else None)
    return field(default=default, metadata=metadata)


def check_value(name: str, value: Any, allowed: Limit | Collection[Any]) -> None:
    """Raise `ValueError` for a value that is outside its limit or not among its choices."""
    if isinstance(allowed, Limit):
        if not allowed.allows(value):
            raise ValueError(f"{name}={value}: {allowed}")
    elif getattr(value, "value", value) not in tuple(allowed):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}.")


def check_ranges(args: Any, limits: Mapping[str, Limit]) -> None:
    """Raise `ValueError` for an attribute of `args` outside its limit. None, a flag that was not given, is inside."""
    for name, limit in limits.items():
        if (value := getattr(args, name, None)) is not None:
            check_value(name, value, limit)


def check_fields(args: Any, cls: type, names: Iterable[str] | None = None) -> None:
    """Raise `ValueError` for an attribute of `args` whose type, choices or range are not those of the dataclass `cls`.

    Neither a boolean, despite Python, nor a string counts as a number.

    Args:
        names: of the fields to check. Default: those that `cls` adds to its parents.
    """
    hints = _hints(cls)
    names = set(cls.__annotations__ if names is None else names)
    chosen = [f for f in fields(cls) if f.name in names and hasattr(args, f.name)]
    for f in chosen:
        _check_type(f, getattr(args, f.name), hints[f.name])
    check_ranges(args, {f.name: f.metadata["limit"] for f in chosen if f.metadata.get("limit")})


def check_numbers(args: Any, cls: type, limits: Mapping[str, Limit]) -> None:
    """Raise `ValueError` for a number of a library's dataclass that is a boolean, NaN, or outside `limits`."""
    numeric = [name for name, hint in _hints(cls).items() if _kinds(hint) <= {int, float, NoneType}]
    check_fields(args, cls, [name for name in numeric if name in limits or isinstance(getattr(args, name, None), bool)])
    for f in fields(cls):
        value = getattr(args, f.name, None)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{f.name}={value}: give a number, not NaN.")
    check_ranges(args, limits)


class Needs(NamedTuple):
    """What some flags need to have an effect."""

    flags: Collection[str]
    are_met: Callable[[Any], bool]
    reason: str  # completes "no effect with"; `{0.NAME}` is the value of a flag


def without_effect(args: Any, table: Iterable[Needs]) -> Iterator[str]:
    """A message for each row of a table whose flags were set but change nothing; each flag is named once."""
    set_flags = [f.name for f in fields(args) if getattr(args, f.name) != f.default]
    for flags, are_met, reason in table:
        unused = [name for name in set_flags if name in flags]
        if unused and not are_met(args):
            set_flags = [name for name in set_flags if name not in unused]
            values = ", ".join(f"{name}={getattr(args, name)}" for name in unused)
            yield f"{values} {'has' if len(unused) == 1 else 'have'} no effect with {reason.format(args)}."


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The fields' types as they were written: HfArgumentParser changes the types in the fields themselves."""
    return get_type_hints(cls)


def _check_type(field: Field, value: Any, hint: Any) -> None:
    kinds, choices = _kinds(hint), field.metadata.get("choices")
    if value is None and (field.default is None or NoneType in kinds):
        return
    if choices is not None:
        check_value(field.name, value, choices)
    elif not any(_is(value, kind) for kind in kinds):
        expected = _in_words(kinds)
        remedy = f" {YAML_BOOLEANS}" if isinstance(value, bool) and not kinds & {int, float} else ""
        raise ValueError(f"{field.name}={value!r}: give {expected}, not a {type(value).__name__}.{remedy}")


def _kinds(hint: Any) -> set[Any]:
    """The types of an annotation. Beside an enumeration, `str` stands for the names of its members."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = {get_origin(part) or part for part in parts}
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
