"""What the help of a command says of its settings: key, type, default, and the text beside the field."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass
from typing import Annotated, Any, Literal

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
_UNIONS = (types.UnionType, typing.Union)
_INDENT = " " * 6
_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


@dataclass(frozen=True)
class Setting:
    """One dotted key."""

    key: str
    kind: str
    """Its type and bounds, in words."""
    default: str
    """As a recipe would write it, or what stands for it, such as "required"."""
    text: str


def settings_text(place: str) -> str:
    """The settings of the config at `place` ("module:Class"), wrapped for the terminal."""
    module, _, name = place.partition(":")
    kind = getattr(importlib.import_module(module), name)
    width = max(40, shutil.get_terminal_size().columns - 2)
    lines = ["settings (key=value):"]
    for setting in settings(kind, _preset_defaults() if name == "TrainConfig" else {}):
        default = setting.default if setting.default.startswith("required") else f"default {setting.default}"
        lines.append(f"  {setting.key}: {setting.kind}; {default}")
        if setting.text:
            lines += textwrap.wrap(setting.text, width, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return "\n".join(lines) + "\n"


def settings(kind: type, defaults: Mapping[str, str], prefix: str = "") -> Iterator[Setting]:
    """Every setting of the dataclass `kind`, sections opened. `defaults` are by dotted key and stand in place
    of the fields' own."""
    hints, texts = typing.get_type_hints(kind, include_extras=True), _texts(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        choices = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
        section = next(filter(dataclasses.is_dataclass, choices), None)
        if isinstance(section, type):
            for inner in settings(section, defaults, f"{key}."):
                optional = inner.default == "required" and field.default is None
                yield dataclasses.replace(inner, default=f"required with {key}") if optional else inner
        elif field.name != "command":
            yield Setting(key, _words(hint), defaults.get(key) or _default(field), texts.get(field.name, ""))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return json.dumps(field.default_factory())
    return "required" if field.default is MISSING else json.dumps(field.default)


def _texts(kind: type) -> dict[str, str]:
    """The string below each field, of the bases too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for one, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[one.target.id] = " ".join(text.value.split())
    return found


def _words(hint: Any) -> str:
    """A type, as somebody who writes YAML would call it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return ", ".join([_words(arguments[0]), *_limits(arguments[1:])])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in _UNIONS:
        return " or ".join(map(_words, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_words(arguments[0])}"
        return f"[{', '.join(map(_words, arguments))}]"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of names to {_words(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return _NAMES.get(hint, str(hint))


def _limits(extras: tuple[Any, ...]) -> Iterator[str]:
    for extra in extras:
        for limit in getattr(extra, "metadata", ()):
            for name, words in _LIMITS.items():
                if hasattr(limit, name):
                    yield words.format(getattr(limit, name))


def _preset_defaults() -> dict[str, str]:
    """Of the model: what all presets agree in, or that the preset decides."""
    from model.config import DEFAULT_PRESET, PRESETS, preset
    from system.config import flatten

    every = [flatten(asdict(preset(name)), "model.") for name in PRESETS]
    found = {
        key: json.dumps(value) if all(one[key] == value for one in every) else "by model.preset"
        for key, value in every[0].items()
    }
    return found | {"model.preset": f"{DEFAULT_PRESET}; one of {', '.join(PRESETS)}"}
