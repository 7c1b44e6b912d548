"""The definition of a grid: a YAML file of the runs to compare."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from .redaction import redact

Scalar = str | int | float | bool
#: Flags that a grid cannot set -> how to set them instead.
RESERVED = {
    "seed": "Write seeds: [...], or --seeds.",
    "output_dir": "Give --output_dir to compare.py: each run gets a folder in it.",
    "hub_token": "Give --hub_token to compare.py, or set HF_TOKEN: a grid is a file that others may read.",
    "arm": "Write arms: {...}.",
}
_DESCRIPTIONS = {
    dict: "names with values (name: value)",
    list: "a list ([a, b])",
    str: "text, in quotes if YAML would read it as something else, as with on, off, yes, no",
    int: "a whole number",
    bool: "true or false",
    Scalar: "text, a number, or true or false",
}


class Published(TypedDict):
    file: str
    arms: dict[str, str]
    names: dict[str, str]


class Tuned(TypedDict):
    axes: list[str]
    by: str


@dataclass
class Grid:
    """Arms to compare at every combination of axes and seeds.

    Args:
        script: the training script: one of `hf_gr/scripts`, or the path of another.
        arms: name -> flags that define it.
        baseline: the arm that the others are compared with.
        metric: a key of the evaluation, for which less is better.
        percent: whether to show the metric times 100.
        also: further keys of the results to show beside the metric, as they are.
        recipe: the recipe that all runs start from: one that ships, or a path.
        flags: those of all runs.
        axes: flag -> values.
        ignores: arm -> flags that have no effect on it; see `fixed_by`.
        tuned: `axes` along which each arm has its best value chosen, and the metric to choose `by`, for which less is
            better.
        picture: a key of `PICTURES`. Default: the one for this number of axes, if there is one.
        published: `file` (columns table, model, dataset, optimizer, method, mean, std; label_noise if there is any),
            `arms` (name -> method) and `names` (value of a flag -> name in the file).
        published_like: model, dataset and optimizer to look up instead of those of the runs.

    Raises:
        ValueError: a value has the wrong type, is listed twice, or has no effect.
    """

    script: str
    arms: dict[str, dict[str, Scalar]]
    baseline: str
    metric: str = "eval_loss"
    percent: bool = False
    also: list[str] = field(default_factory=list)
    recipe: str | None = None
    flags: dict[str, Scalar] = field(default_factory=dict)
    axes: dict[str, list[Scalar]] = field(default_factory=dict)
    ignores: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    tuned: Tuned | None = None
    picture: str | None = None
    published: Published | None = None
    published_like: dict[str, str] | None = None

    def __post_init__(self):
        for name, kind in get_type_hints(Grid).items():
            _require(name, getattr(self, name), kind)
        if not self.arms:
            raise ValueError("arms={}: there is nothing to compare. Give at least one arm.")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline!r}: choose one of the arms, {', '.join(self.arms)}.")
        for name, values in {**self.axes, "seeds": self.seeds}.items():
            repeated = [str(value) for value, count in Counter(map(identity, values)).items() if count > 1]
            if not values or repeated:
                raise ValueError(f"{name}={values}: list each value once, and at least one.")
        if repeated := sorted({key for key in self.also if [self.metric, *self.also].count(key) > 1}):
            raise ValueError(f"also={self.also}: {', '.join(repeated)} is shown already. List it once.")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds}: a seed is 0 or more. Leave out {min(self.seeds)}.")
        if unknown := sorted(set(self.ignores) - set(self.arms)):
            raise ValueError(f"ignores: {', '.join(unknown)} is none of the arms, {', '.join(self.arms)}.")
        self._check_flags()
        self._check_tuned()
        self._check_published()

    def _check_flags(self) -> None:
        in_arms = {flag for flags in self.arms.values() for flag in flags}
        for flag in (*self.flags, *in_arms, *self.axes):
            if flag in RESERVED:
                raise ValueError(f"{flag}: a grid cannot set this flag. {RESERVED[flag]}")
            if not flag.isidentifier():
                raise ValueError(f"{flag}: write {flag.strip('-').replace('-', '_')}, the flag's name in Python.")
        for flag, values in self.axes.items():
            if all(flag in self.fixed_by(arm) for arm in self.arms):
                raise ValueError(
                    f"{flag}: an axis has no effect on a flag that the arms set or ignore. Leave one of them out."
                )
            if [str(value) for value in values] != redact(map(str, values)):
                raise ValueError(f"{flag}: a value of this axis is a token, and values become folder names.")

    def _check_tuned(self) -> None:
        if self.tuned is not None and (unknown := [axis for axis in self.tuned["axes"] if axis not in self.axes]):
            raise ValueError(f"tuned.axes: {', '.join(unknown)} is none of the axes, {', '.join(self.axes) or 'none'}.")

    def fixed_by(self, arm: str) -> set[str]:
        """The flags that an arm sets or ignores: it is run once for all values of such an axis."""
        return {*self.arms[arm], *self.ignores.get(arm, [])}

    def _check_published(self) -> None:
        if self.published is None:
            if self.published_like is not None:
                raise ValueError(f"published_like={self.published_like}: no effect without published. Leave it out.")
            return
        if unknown := sorted(set(self.published["arms"]) - set(self.arms)):
            raise ValueError(f"published.arms: {', '.join(unknown)} is none of the arms, {', '.join(self.arms)}.")
        if unknown := sorted(set(self.published_like or {}) - {"model", "dataset_name", "optim"}):
            raise ValueError(f"published_like: {', '.join(unknown)} is not one of model, dataset_name, optim.")
        if unknown := sorted(set((self.published_like or {}).values()) - set(self.published["names"])):
            raise ValueError(f"published_like: {', '.join(unknown)} is not in published.names. Add it there.")


def identity(value: Scalar) -> str:
    """Equal for values that are the same to a script: 0.1 and "0.10", a folder with and without a trailing slash."""
    try:
        return repr(float(str(value)))
    except ValueError:
        return str(value).rstrip("/")


def _require(where: str, value: Any, kind: Any) -> None:
    """Raise `ValueError` if `value` is not of the type `kind`: a class, a union, `list[...]`, `dict[str, ...]`, or a
    `TypedDict`."""
    if kind is Any:
        return
    if is_typeddict(kind):
        _require_keys(where, value, get_type_hints(kind))
        return
    options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    matching = [option for option in options if type(value) is (get_origin(option) or option)]
    typed_dicts = [option for option in options if is_typeddict(option)]
    if typed_dicts and value is not None:
        _require(where, value, typed_dicts[0])
    elif not matching:
        plain = [option for option in options if option is not type(None)]
        expected = _DESCRIPTIONS.get(kind) or _DESCRIPTIONS[get_origin(plain[0]) or plain[0]]
        raise ValueError(f"{where}={value!r}: this must be {expected}.")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _require(f"{where}, a name", key, str)
            _require(f"{where}.{key}", inner, get_args(matching[0])[1])
    elif isinstance(value, list):
        for inner in value:
            _require(where, inner, get_args(matching[0])[0])


def _require_keys(where: str, value: Any, kinds: dict[str, Any]) -> None:
    _require(where, value, dict[str, Any])
    if set(value) != set(kinds):
        raise ValueError(f"{where} has {', '.join(value) or 'nothing'}: give {', '.join(kinds)}, and nothing else.")
    for key, kind in kinds.items():
        _require(f"{where}.{key}", value[key], kind)


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for name, count in names.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_grid(path: Path, scale: str | None = None) -> Grid:
    """The grid in a YAML file, whose `scales` contain what changes with the size: recipe, flags, axes, seeds.

    Raises:
        ValueError: there is no such file or scale, or it is invalid; the message names the file and the key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}). Correct it.") from error
    try:
        content = _at_scale(content, scale)
        keys = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(Grid)}
        _refuse_keys("unknown key", sorted(set(content) - set(keys)), f"Known keys are {', '.join(keys)}, scales.")
        _refuse_keys("missing key", [k for k, required in keys.items() if required and k not in content], "Add it.")
        return Grid(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse_keys(problem: str, names: Iterable[str], remedy: str) -> None:
    if names := list(names):
        raise ValueError(f"{problem} {', '.join(names)}. {remedy}")


def _at_scale(content: Any, scale: str | None) -> dict[str, Any]:
    _require("the file", content, dict[str, Any])
    scales = content.pop("scales", {})
    _require("scales", scales, dict[str, Any])
    if scale is None:
        return content
    if scale not in scales:
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(scales) or 'none, it has no scales'}.")
    _require(f"scales.{scale}", scales[scale], dict[str, Any])
    for key, value in scales[scale].items():
        if isinstance(value, dict):
            _require(key, content.get(key, {}), dict[str, Any])
            value = {**content.get(key, {}), **value}
        content[key] = value
    return content
