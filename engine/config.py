"""Configuration: a YAML file or shipped preset, overridden key by key, checked strictly, written back whole.

    configs/<stage>/<name>.yaml   a preset, named `<stage>/<name>`
    --section.key=value           an override; list items by index: --model.scales.1.depth=4
    RUN/config.yaml               the resolved result, every key spelled out

YAML is read by the 1.2 rules: `1e-4` is a number, `off` and `10:20` are strings, a repeated key is an error.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from .errors import UserError, did_you_mean, one_line

Tree = dict[str, Any]
Key = tuple[str, ...]
Schema = TypeVar("Schema", bound="Section")

# Setting one of these on the command line takes the other out of the preset.
ALTERNATIVES: dict[Key, Key] = {("train", "steps"): ("train", "epochs"), ("train", "epochs"): ("train", "steps")}


class Section(BaseModel):
    """A part of a configuration: unknown keys refused, types strict, values fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------- YAML 1.2


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 scalars that refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""


_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _yaml_class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML text; `source` is named in the error.

    Raises:
        UserError: the text is not YAML.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)
        json.dumps(tree)  # refuses what YAML can hold and a configuration cannot: dates, sets, loops
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(one_line(f"{source} cannot be read as a configuration: {error}")) from error
    return tree


def dump_yaml(config: Section) -> str:
    """Every key of the configuration as YAML that reads back equal."""
    return yaml.dump(_plain(config.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Tuples as lists; everything else a configuration holds is YAML already."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quoted with escapes where a character would not survive being read back."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_str)


# ---------------------------------------------------------------------------------------------- presets and overrides


def presets() -> list[str]:
    """Names of the shipped presets, e.g. `pretrain/demo`."""
    root = resources.files("miram") / "configs"
    return sorted(
        f"{stage.name}/{file.name.removesuffix('.yaml')}"
        for stage in root.iterdir()
        if stage.is_dir() and stage.name != "accelerate"  # files for `accelerate launch --config_file`
        for file in stage.iterdir()
        if file.name.endswith(".yaml")
    )


def read_tree(config: str) -> Tree:
    """The YAML mapping of a preset name or a file path.

    Raises:
        UserError: there is neither, or it holds no mapping.
    """
    shipped = resources.files("miram") / "configs" / f"{config}.yaml"
    file = shipped if config in presets() else Path(config)
    if not file.is_file():
        known = did_you_mean(config, presets()) or f"; presets: {', '.join(presets())}"
        raise UserError(f"no preset and no file is called {config!r}{known}")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{config} is no UTF-8 text, so no configuration") from error
    tree = parse_yaml(text, config)
    if not isinstance(tree, dict):
        raise UserError(f"{config} must hold a mapping of sections, like those in the presets")
    return tree


def parse_overrides(arguments: Sequence[str]) -> dict[Key, Any]:
    """`--a.b=value` and `--a.b value` as {("a", "b"): value}, values read as YAML.

    Raises:
        UserError: an argument is not of that form.
    """
    overrides: dict[Key, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; settings are given as --section.key=value")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                raise UserError(f"--{name} has no value; write --{name}=value")
        overrides[tuple(name.split("."))] = parse_yaml(text, f"--{name}")
    for key, other in ALTERNATIVES.items():
        if key in overrides and other in overrides:
            raise UserError(f"--{'.'.join(key)} and --{'.'.join(other)}: set exactly one of {key[-1]} and {other[-1]}")
    return overrides


def override(tree: Tree, key: Key, value: Any) -> None:
    """Set one key of the tree in place, making sections and indexing lists on the way.

    Raises:
        UserError: a list index is out of range or not a number.
    """
    if key in ALTERNATIVES:
        *parents, last = ALTERNATIVES[key]
        section = _descend(tree, tuple(parents), key)
        if isinstance(section, dict):
            section.pop(last, None)
    parent = _descend(tree, key[:-1], key)
    parent[_index(parent, key[-1], key)] = value


def _descend(tree: Any, path: Key, key: Key) -> Any:
    for part in path:
        index = _index(tree, part, key)
        if isinstance(tree, dict) and tree.get(index) is None:
            tree[index] = {}
        tree = tree[index]
        if not isinstance(tree, dict | list):
            raise UserError(f"--{'.'.join(key)}: {part} is a single value and holds no keys")
    return tree


def _index(parent: Any, part: str, key: Key) -> Any:
    if isinstance(parent, dict):
        return part
    if not part.isdecimal() or int(part) >= len(parent):
        raise UserError(f"--{'.'.join(key)}: {part!r} is not an item of a list of {len(parent)} (the first is 0)")
    return int(part)


# ---------------------------------------------------------------------------------------------- checking


def load(schema: type[Schema], config: str, arguments: Sequence[str] = ()) -> Schema:
    """Preset or file, then command-line overrides, checked against the schema.

    Raises:
        UserError: one line that names the file or override, the full key, and the nearest valid name.
    """
    tree = read_tree(config)
    overrides = parse_overrides(arguments)
    for key, value in overrides.items():
        override(tree, key, value)
    return check(schema, tree, config, overrides)


def check(schema: type[Schema], tree: Tree, source: str, overrides: Mapping[Key, Any] | None = None) -> Schema:
    """Validate a tree; JSON mode so that lists become tuples while numbers and strings stay apart."""
    try:
        return schema.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        lines = [_explain(schema, problem, source, overrides or {}) for problem in error.errors()]
        raise UserError("; ".join(dict.fromkeys(lines))) from error


def _explain(schema: type[BaseModel], problem: Any, source: str, overrides: Mapping[Key, Any]) -> str:
    location = _key_path(schema, problem)
    path = ".".join(location)
    origin = f"{source}: {path}" if path else source
    for key in overrides:
        if location and (key[: len(location)] == location or location[: len(key)] == key):
            origin = f"--{path}"
    if problem["type"] == "extra_forbidden":
        return one_line(f"{origin} is not a known key{_nearest(schema, location)}")
    if problem["type"] == "missing":
        return f"{origin} is missing; set it in the file or with --{path}=…"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    example = f"; write a list, as --{path}=[{problem['input']}]" if problem["type"] == "tuple_type" else ""
    return one_line(f"{origin}: {message}{value}{example}")


def _key_path(schema: type[BaseModel], problem: Any) -> Key:
    """The key an error is about. Pydantic's location also names the types of a union it tried: those are left out."""
    path: list[str] = []
    model: Any = schema
    named = False  # the next part is a name that the user chose, of a mapping
    for part in problem["loc"]:
        fields = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}
        if named or isinstance(part, int):
            path.append(str(part))
            named = False
        elif part in fields:
            path.append(part)
            named, model = get_origin(fields[part].annotation) is dict, _inner(fields[part].annotation)
        elif part == problem["loc"][-1] and problem["type"] == "extra_forbidden":
            path.append(part)
    return tuple(path)


def _nearest(schema: type[BaseModel], location: Key) -> str:
    """`; did you mean 'train.batch_size'?` among the keys beside the unknown one."""
    model: Any = schema
    for part in location[:-1]:
        model = _inner(model.model_fields[part].annotation) if part in model.model_fields else model
    parent = ".".join(location[:-1])
    known = list(model.model_fields)
    hint = did_you_mean(location[-1], known)
    return hint.replace("did you mean '", f"did you mean '{parent}.") if parent else hint


def _inner(annotation: Any) -> Any:
    """The section class inside `list[X]`, `X | None` and the like."""
    if get_origin(annotation) is None:
        return annotation
    inner = [_inner(a) for a in get_args(annotation) if a is not type(None)]
    sections = [a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)]
    return sections[0] if sections else inner[0]


def options_of(function: Callable[..., Any]) -> type[Section]:
    """The keyword-only parameters of a function or class as a schema, so that `options` are checked like any key."""
    fields: dict[str, Any] = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return create_model(f"{function.__name__}Options", __base__=Section, **fields)


def check_options(function: Callable[..., Any], options: Tree, owner: str) -> None:
    """Refuse options that the function does not take, or takes with another type.

    Raises:
        ValueError: with a sentence for the user; inside a validator it becomes part of the config's error.
    """
    try:
        check(options_of(function), options, "options")
    except UserError as error:
        raise ValueError(f"{error} (options of {owner})") from error


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting, for `--help`."""
    for name, field in schema.model_fields.items():
        inner = _inner(field.annotation)
        if isinstance(inner, type) and issubclass(inner, Section):
            origin: Any = get_origin(field.annotation)
            dot = {list: ".0.", tuple: ".0.", dict: ".NAME."}.get(origin, ".")
            yield from keys(inner, f"{prefix}{name}{dot}")
        else:
            default = (
                "required"
                if field.is_required()
                else json.dumps(field.get_default(call_default_factory=True), default=str)
            )
            meaning = " ".join((field.description or "").split())  # the source breaks lines as it likes
            yield f"{prefix}{name}", _type_name(field.annotation), default, meaning


def _type_name(annotation: Any) -> str:
    """A type as a user would write it down."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if origin is Annotated:
        return _type_name(parts[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, parts))
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(part) for part in parts if part is not Ellipsis)}]"
    return str(annotation.__name__)
