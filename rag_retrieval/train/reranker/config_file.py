"""From a YAML file and command-line options to a configuration, with all problems reported at once.

What is read is a `TrainingConfig` unless another `Schema` is given: any pydantic class of plain fields.

Easy to get wrong: a path in a file is looked up from the current folder first and from the file's folder
second, so that a shipped file works from any folder; YAML 1.1 reads `5e-5` as text, the reader here does not.
"""

import difflib
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rag_retrieval.train.reranker.config_checks import DECODER_DEFAULTS, PATH_BEGINNINGS, is_data_file_name
from rag_retrieval.train.reranker.training_config import ABSENT, FLOAT_DIGITS, KEY_ALIASES, TrainingConfig

PACKAGE_NAME = re.compile(r"package:[A-Za-z_][A-Za-z0-9_-]*")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LONGEST_SHOWN = 60  # characters of a wrong value in a message


class ConfigError(ValueError):
    """Its message has one line per problem: where, which key, what was found, what was expected."""


@dataclass(frozen=True)
class Schema:
    """A class of configurations, and which of its keys name something outside of the file.

    example: a line, for messages. aliases: other names of keys. models: a folder, a hub name or package:NAME.
    datasets: a file or a hub name. folders, paths: a folder, or anything, that must be there. outputs: may not be.
    escaped: texts in which \\n, \\t and \\\\ of the command line stand for a newline, a tab and a backslash.
    """

    model: type[BaseModel]
    example: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    folders: Sequence[str] = ()
    paths: Sequence[str] = ()
    outputs: Sequence[str] = ()
    escaped: Sequence[str] = ()

    @property
    def keys(self) -> dict[str, FieldInfo]:
        return self.model.model_fields


TRAINING = Schema(
    TrainingConfig,
    "model_type: bert_encoder",
    aliases=KEY_ALIASES,
    models=("model_name_or_path",),
    datasets=("train_dataset", "val_dataset"),
    folders=("resume",),
    outputs=("output_dir",),
    escaped=tuple(DECODER_DEFAULTS),
)


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


def load_config(
    path: str | None,
    overrides: Sequence[str] = (),
    extra_config_folder: Path | None = None,
    schema: Schema = TRAINING,
) -> Any:
    """The configuration in the YAML file `path`, where `overrides` (`--lr 3e-5`, `--lr=3e-5`) win.

    `path` is looked up from the current folder, then in `extra_config_folder`; None: there is no file. Returns an
    object of the schema's class. Raises ConfigError.
    """
    file = None if path is None else find_config(path, extra_config_folder)
    in_file = _Source() if file is None else _read_file(file, schema)
    given = _read_overrides(overrides, schema)
    source = _Source(
        in_file.values | given.values, in_file.places | given.places, in_file.problems + given.problems
    )
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
            source.problems.append((key, f"--{name}: needs a value; expected {_expected(key, schema)}"))
            continue
        source.places[key] = f"--{name}"
        try:
            source.values[key] = _override_value(key, text, schema)
        except yaml.YAMLError:
            source.report(key, f"expected {_expected(key, schema)}, found {_found(text)}")
    return source


def _override_value(key: str, text: str, schema: Schema) -> Any:
    """The value of a command-line text, by the rules of the file; text stays text without quotes."""
    types = _types(key, schema) if key in schema.keys else [str]
    if key in schema.escaped and text:
        text = re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)
    reader = _Reader("")
    tag = reader.resolve(yaml.ScalarNode, text, (True, False))
    if tag.endswith(":null"):
        return text if key in schema.escaped and not text else None
    if list[str] in types and text.startswith("["):
        return yaml.load(text, Loader=_Reader)
    if list[str] in types and "," in text:
        return [name.strip() for name in text.split(",")]
    if str in types or get_origin(types[0]) is Literal:
        return text
    return reader.construct_object(yaml.ScalarNode(tag, text))


def _look_up_paths(source: _Source, config_folder: Path, schema: Schema) -> None:
    """Makes the paths among the values absolute, but for outputs, which may not exist yet."""
    for key in schema.outputs:
        if isinstance(source.values.get(key), str):
            source.values[key] = os.path.expanduser(source.values[key])
    for key in (*schema.models, *schema.datasets, *schema.folders, *schema.paths):
        value = source.values.get(key)
        names = value if isinstance(value, list) else [value]
        try:
            found = [_look_up(key, name, config_folder, schema) if _is_name(name) else name for name in names]
        except LookupError as error:
            source.report(key, error.args[0])
        else:
            if key in source.values:
                source.values[key] = found if isinstance(value, list) else found[0]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value not in ABSENT


def _look_up(key: str, name: str, config_folder: Path, schema: Schema) -> str:
    """An absolute path, or `name` where it is one of the hub or of a package. Raises LookupError."""
    if key == "resume" and name == "auto":
        return name
    if key in schema.models and name.startswith("package:"):
        if PACKAGE_NAME.fullmatch(name):
            return name
        raise LookupError(f"expected the name of a Python package after package:, found {_found(name)}")
    is_dataset = key in schema.datasets
    places = _places(name, config_folder)
    for place in places:
        if os.path.exists(place) if is_dataset or key in schema.paths else os.path.isdir(place):
            return str(place)
    is_path = key in schema.folders or key in schema.paths or name.startswith(PATH_BEGINNINGS)
    is_path = is_path or (is_dataset and is_data_file_name(name))
    if is_path or not HUB_NAME.fullmatch(name):
        kind = "file or folder" if key in schema.paths else "file" if is_dataset else "folder"
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
            if key not in reported:  # a union has an entry for each of its types
                reported.add(key)
                source.places.setdefault(key, f"{place}{key}")
                source.report(key, _message(key, entry, source.values.get(key), schema))
    return None


def _message(key: str, entry: dict[str, Any], value: Any, schema: Schema) -> str:
    if entry["type"] == "problem":
        return entry["msg"]
    if entry["type"] == "missing":
        return f"is missing; expected {_expected(key, schema)}"
    if entry["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, [*schema.keys, *schema.aliases], n=3)
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all keys"
        return f"unknown key; {advice}"
    quotes = _types(key, schema) == [str] and isinstance(value, (bool, int, float))
    return f"expected {_expected(key, schema)}, found {_found(value)}{'; put it in quotes' if quotes else ''}"


def _found(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 4] + " ..."


def _types(key: str, schema: Schema) -> list[Any]:
    """The types a key takes besides None, for example [list[str], str]."""
    annotation = schema.keys[key].annotation
    parts = (annotation,) if get_origin(annotation) in (None, Literal) else get_args(annotation)
    return [part for part in parts if part is not NoneType]


def _expected(key: str, schema: Schema) -> str:
    """What a key takes, for messages and help: `a whole number of at least 1`."""
    types, metadata = _types(key, schema), schema.keys[key].metadata
    if get_origin(types[0]) is Literal:
        return f"one of {', '.join(get_args(types[0]))}"
    if list[str] in types:
        return "a name or a list of names"
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[types[0]]
    if types[0] is str:
        return "non-empty text" if metadata else kind
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [limit for part in metadata for limit in asdict(part).items()]
    bounds = " and ".join(f"{words[name]} {bound:g}" for name, bound in limits)
    return f"{kind} {'of ' if bounds.startswith('at ') else ''}{bounds}".strip()


def describe_options(schema: Schema = TRAINING) -> str:
    """Help text: how options are written, then every key with what it takes, its default and its meaning."""
    lines = [
        "Every key of the YAML file is also an option that wins over the file: --key value or --key=value.",
        "None, null, ~ or nothing means absent."
        + (" In seq, special_token and the formats, \\n is a newline." if schema.escaped else ""),
        "",
    ]
    for key, key_field in schema.keys.items():
        default = "" if key_field.default is None else f" [{_found(key_field.default)}]"
        lines.append(f"  --{key}: {_expected(key, schema)}{' (required)' if key_field.is_required() else default}")
        indent = " " * 6
        lines += textwrap.wrap(key_field.description, 100, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)
