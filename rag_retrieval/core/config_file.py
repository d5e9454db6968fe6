"""From a YAML file and command-line options to a configuration, with all problems reported at once.

What is read is what a `Schema` says: any pydantic class of plain fields.

Easy to get wrong: a path in a file is looked up from the current folder first and from the file's folder
second, so that a shipped file works from any folder; YAML 1.1 reads `5e-5` as text, the reader here does not.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rag_retrieval.core.config_schema import (
    ABSENT,
    PATH_BEGINNINGS,
    Schema,
    expected,
    is_data_file_name,
    message_of,
    shown_value,
    takes_names,
    types_of,
)

FLOAT_DIGITS = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"  # YAML 1.1 misses 5e-5
PACKAGE_NAME = re.compile(r"package:[A-Za-z_][A-Za-z0-9_-]*")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class ConfigError(ValueError):
    """Its message has one line per problem: where, which key, what was found, what was expected."""


class _Reader(yaml.SafeLoader):
    """YAML whose plain scalars are null, true/false (also yes/no, on/off), decimal numbers or text.

    Left out on purpose: octal 010, base-60 1:30, 1_000 and dates, which turn text into something else.
    """

    yaml_implicit_resolvers: dict = {}


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:true|false|yes|no|on|off)", list("tTfFyYnNoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", FLOAT_DIGITS + r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)


@dataclass
class _Source:
    """What was given: values by key, the place of each, and problems as (key, line of the message)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # "train.yaml:3: lr" or "--lr"
    problems: list[tuple[str, str]] = field(default_factory=list)

    def report(self, key: str, message: str) -> None:
        self.problems.append((key, f"{self.places[key]}: {message}"))


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The name given with --config, and the other arguments. Raises ConfigError."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), [*arguments[:position], *arguments[position + 1 :]]
        if argument == "--config":
            if position + 1 == len(arguments):
                raise ConfigError("--config: needs a value; expected a YAML file")
            return arguments[position + 1], [*arguments[:position], *arguments[position + 2 :]]
    return None, list(arguments)


def load_config(
    schema: Schema, path: str | None, overrides: Sequence[str] = (), extra_config_folder: Path | None = None
) -> Any:
    """The configuration in the YAML file `path`, where `overrides` (`--lr 3e-5`, `--lr=3e-5`) win.

    `path` is looked up from the current folder, then in `extra_config_folder`; None: there is no file. Returns an
    object of the schema's class. Raises ConfigError.
    """
    file = None if path is None else find_config(path, extra_config_folder)
    in_file = _Source() if file is None else _read_file(file, schema)
    given = _read_overrides(overrides, schema)
    source = _Source(in_file.values | given.values, in_file.places | given.places, in_file.problems + given.problems)
    _look_up_paths(source, Path.cwd() if file is None else file.parent, schema)
    config = _validate(source, "--" if file is None else f"{_shown(file)}: ", schema)
    if source.problems:
        order = {key: position for position, key in enumerate(source.places)}
        lines = sorted(source.problems, key=lambda problem: order.get(problem[0], len(order)))
        raise ConfigError("\n".join(line for _, line in lines))
    return config


def find_config(name: str, extra_config_folder: Path | None = None) -> Path:
    """The existing file `name`, from the current folder or else from `extra_config_folder`."""
    places = _places(name, extra_config_folder)
    for place in places:
        if os.path.exists(place) and not os.path.isdir(place):
            return place
    if any(map(os.path.isdir, places)):
        raise ConfigError(f"{name}: is a folder; expected a YAML file")
    raise ConfigError(f"{name}: no such file; looked for {_listed(places)}")


def _places(name: str, second_folder: Path | None) -> list[Path]:
    """Absolute places where `name` is looked up, in order, each once."""
    folders = [Path.cwd()] + ([second_folder] if second_folder else [])
    places = [Path(os.path.abspath(folder / os.path.expanduser(name))) for folder in folders]
    return list(dict.fromkeys(places))


def _listed(places: list[Path]) -> str:
    return " and ".join(str(place) for place in places)


def _shown(file: Path) -> str:
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _read_file(file: Path, schema: Schema) -> _Source:
    shown, text = _shown(file), _read_text(file)
    example = f"expected lines such as `{schema.example}`"
    try:
        reader = _Reader(text)
        root = reader.get_single_node()
        if root is None:
            raise ConfigError(f"{shown}: is empty; {example}")
        if not isinstance(root, yaml.MappingNode):
            found = "list" if isinstance(root, yaml.SequenceNode) else "text"
            raise ConfigError(f"{shown}:{_line(root)}: {example}, found a {found}")
        return _read_mapping(reader, root, shown, schema)
    except RecursionError:
        raise ConfigError(f"{shown}: broken YAML: lists or maps nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{shown}:{mark.line + 1}:{mark.column + 1}: broken YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        place = f"{shown}:{len(before)}:{len(before[-1]) + 1}"
        raise ConfigError(f"{place}: broken YAML: found character U+{error.character:04X}") from error


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{_shown(file)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = f"found byte 0x{error.object[error.start]:02x}"
        raise ConfigError(f"{_shown(file)}:{line}: expected UTF-8 text, {found}; save it as UTF-8") from error


def _read_mapping(reader: _Reader, root: yaml.MappingNode, shown: str, schema: Schema) -> _Source:
    source = _Source()
    for key_node, value_node in root.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{shown}:{_line(key_node)}: expected the name of a key, found a list or map")
        key = schema.aliases.get(key_node.value, key_node.value)
        place = f"{shown}:{_line(key_node)}: {key_node.value}"
        if key in source.places:
            source.problems.append((key, f"{place}: given twice, first at {source.places[key]}; keep one"))
            continue
        source.places[key] = place
        try:
            source.values[key] = reader.construct_object(value_node, deep=True)
        except ValueError as error:  # of a tag such as `!!int x`
            source.report(key, str(error))
    return source


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _read_overrides(arguments: Sequence[str], schema: Schema) -> _Source:
    """`--key value` and `--key=value` (for a value that begins with --); of equal keys the last one wins."""
    source, rest = _Source(), list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            source.problems.append((argument, f"{argument}: unexpected; options are written --key value"))
            continue
        name, equals, text = argument[2:].partition("=")
        key = name.replace("-", "_")
        key = schema.aliases.get(key, key)
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and key in schema.keys:
            source.problems.append((key, f"--{name}: needs a value; expected {expected(key, schema)}"))
            continue
        source.places[key] = f"--{name}"
        try:
            source.values[key] = _override_value(key, text, schema)
        except yaml.YAMLError:
            source.report(key, f"expected {expected(key, schema)}, found {shown_value(text)}")
    return source


def _override_value(key: str, text: str, schema: Schema) -> Any:
    """The value of a command-line text, by the rules of the file; text stays text without quotes."""
    types = types_of(key, schema) if key in schema.keys else [str]
    if key in schema.escaped and text:
        text = re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)
    reader = _Reader("")
    tag = reader.resolve(yaml.ScalarNode, text, (True, False))
    if tag.endswith(":null"):
        return text if key in schema.escaped and not text else None
    names = takes_names(key, schema) if key in schema.keys else False
    if names and text.startswith("["):
        return yaml.load(text, Loader=_Reader)
    if names and text not in ABSENT and ("," in text or str not in types):
        return [name.strip() for name in text.split(",")]
    if str in types or get_origin(types[0]) is Literal:
        return text
    return reader.construct_object(yaml.ScalarNode(tag, text))


def _look_up_paths(source: _Source, config_folder: Path, schema: Schema) -> None:
    """Makes the paths among the values absolute, but for outputs, which may not exist yet."""
    for key in schema.outputs:
        if isinstance(source.values.get(key), str):
            source.values[key] = os.path.expanduser(source.values[key])
    for key in dict.fromkeys((*schema.models, *schema.datasets, *schema.folders, *schema.paths, *schema.files)):
        value = source.values.get(key)
        names = value if isinstance(value, list) else [value]
        try:
            found = [_looked_up(key, name, config_folder, schema) for name in names]
        except LookupError as error:
            source.report(key, error.args[0])
        else:
            if key in source.values:
                source.values[key] = found if isinstance(value, list) else found[0]


def _looked_up(key: str, value: Any, config_folder: Path, schema: Schema) -> Any:
    """`_look_up` of a name, or of the `path` of a mapping; anything else stays for pydantic to judge."""
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _looked_up(key, value["path"], config_folder, schema)}
    is_name = isinstance(value, str) and bool(value) and value not in ABSENT
    return _look_up(key, value, config_folder, schema) if is_name else value


def _look_up(key: str, name: str, config_folder: Path, schema: Schema) -> str:
    """An absolute path, or `name` where it is no path: of the hub, of a package, a word. Raises LookupError."""
    is_file_name = is_data_file_name(name)
    if name in schema.words.get(key, ()) or (key in schema.files and not is_file_name):
        return name
    if key in schema.models and name.startswith("package:"):
        if PACKAGE_NAME.fullmatch(name):
            return name
        raise LookupError(f"expected the name of a Python package after package:, found {shown_value(name)}")
    may_be_file = key in (*schema.datasets, *schema.paths, *schema.files)
    places = _places(name, config_folder)
    for place in places:
        if os.path.exists(place) if may_be_file else os.path.isdir(place):
            return str(place)
    is_path = key in (*schema.folders, *schema.paths, *schema.files) or name.startswith(PATH_BEGINNINGS)
    is_path = is_path or (key in schema.datasets and is_file_name)
    if is_path or not HUB_NAME.fullmatch(name):
        may_be_folder = key in (*schema.models, *schema.folders, *schema.paths)
        kind = " or ".join(["file"] * may_be_file + ["folder"] * may_be_folder)
        raise LookupError(f"found no {kind} {name}; looked for {_listed(places)}")
    return name


def _validate(source: _Source, place: str, schema: Schema) -> BaseModel | None:
    """place: what stands before a key that was given nowhere."""
    try:
        return schema.model.model_validate(source.values)
    except ValidationError as error:
        reported = set()
        for entry in error.errors(include_url=False):
            key = entry["loc"][0]
            # a union has an entry for each of its types
            if entry["type"] == "problem" or key not in reported:
                reported.add(key)
                source.places.setdefault(key, f"{place}{key}")
                source.report(key, message_of(key, entry, source.values.get(key), schema))
    return None
