"""From a recipe to typed configuration: YAML, settings on the command line, validation.

A recipe is YAML; knobs are ``key=value`` with dotted keys. Unknown keys, wrong types and impossible values
are a `ConfigError` with the dotted path, before anything is allocated (design law 8).
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from cluster.errors import ConfigError

T = TypeVar("T")


class _RecipeLoader(yaml.SafeLoader):
    """Numbers, true, false and null are what YAML 1.2 takes for them, so ``no`` is a word, ``1e-4`` a number
    and a date a text; ``012`` is 12 there and 10 in YAML 1.1, and here a text. A key that stands twice is an
    error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # those of YAML 1.1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"the key '{twice[0]}' stands twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        value = yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader: builds plain values only
        json.dumps(value)  # refuses what holds itself, and what a tag such as !!binary makes
    except RecursionError:
        reason = "nested too deeply"
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
    else:
        return value
    raise ConfigError(
        f"{where if len(where) <= 100 else where[:97] + '...'}: not valid YAML ({reason}); correct the recipe"
    )


def parse_overrides(overrides: list[str]) -> list[tuple[list[str], Any]]:
    """``["a.b=1"]`` -> ``[(["a", "b"], 1)]``; values are read as YAML. A setting that would undo one before
    it is an error."""
    pairs: list[tuple[list[str], Any]] = []
    for item in overrides:
        key, separator, value = item.partition("=")
        path = key.split(".")
        if not separator or not all(path):
            raise ConfigError(f"'{item}' is not of the form key=value; write for example run.steps=100")
        undone = next((".".join(before) for before, _ in pairs if before[: len(path)] == path), None)
        if undone == key:
            raise ConfigError(f"{key}: given twice on the command line; give it once")
        if undone is not None:
            raise ConfigError(f"{key}: undoes {undone}, which is given before it; give one of them")
        pairs.append((path, _parse_yaml(value, item)))
    return pairs


def apply_overrides(values: dict, overrides: list[str]) -> dict:
    """A copy of plain `values` with the settings of the command line put in."""
    values = json.loads(json.dumps(values))
    for path, value in parse_overrides(overrides):
        node = values
        for depth, name in enumerate(path[:-1], start=1):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{'.'.join(path)}: '{'.'.join(path[:depth])}' is a value, not a section")
        node[path[-1]] = value
    return values


def validate(kind: type[T], values: dict, where: str, *, recipe: bool = True) -> T:
    """Build `kind` (a dataclass) from plain values. No number may be NaN or infinite.

    Args:
        where: what the values are from; begins the message.
        recipe: whether there is a recipe to which something could be added.

    Raises:
        ConfigError: unknown key, wrong type, missing key or impossible value; one line with every dotted
        path.
    """
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # nested sections inherit it
    try:
        return TypeAdapter(with_config(strict)(kind)).validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [_explain(problem, recipe) for problem in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _explain(problem: Any, recipe: bool) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    start = f"{path}: " if path else ""
    if problem["type"] == "unexpected_keyword_argument":
        return f"{start}unknown key, remove it or correct its spelling"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{start}missing, {'add it to the recipe or ' if recipe else ''}give {path}=..."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{start}{message}"
    shown = repr(problem["input"])
    return (
        f"{start}{message[0].lower()}{message[1:]}, not {shown if len(shown) <= 100 else shown[:97] + '...'}"
    )


def read_recipe(path: str) -> dict:
    """The plain values of a recipe file. Raises ConfigError when it is absent or not a YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"{path}: cannot read the recipe ({reason}); give the path of a YAML recipe"
        ) from None
    values = _parse_yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a YAML mapping of sections; see configs/ for examples")
    return values


def load_recipe(path: str, overrides: list[str], kind: type[T]) -> T:
    """Read, override and validate the recipe at `path` as a `kind`."""
    return build_config(apply_overrides(read_recipe(path), overrides), path, kind)


def build_config(values: dict, path: str, kind: type[T]) -> T:
    """Validate `values` as a `kind`, which must be for the command that the recipe names."""
    wanted = next(f.default for f in dataclasses.fields(kind) if f.name == "command")  # type: ignore[arg-type]
    given = values.get("command", wanted)
    if given != wanted:
        raise ConfigError(f"{path}: this recipe is for `maskclip {given}`, not `maskclip {wanted}`")
    return validate(kind, values, path)
