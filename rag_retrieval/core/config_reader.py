"""From a YAML file and command-line options to a configuration; all problems are reported with file, line and key.

A scalar of YAML and an option are both text, and the type of the key says what it becomes: pydantic reads `5e-5`, `3`
and `true`. A path is looked up from the current folder first and from the file's folder second, so that a shipped
file works from any folder.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import ValidationError

from rag_retrieval.core.config import ABSENT, Config, Escaped, expected, parts_of, places_of, shown_value

PLAIN_ABSENT = ("", "~", "null", "Null", "NULL", "None", "none")  # without quotes, what means "not given"
OUR_MESSAGES = ("value_error", "problem")  # types of errors that our validators raise
PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 10_000, 20  # of a file; values of it, after aliases; lists in lists

ConfigClass = TypeVar("ConfigClass", bound=Config)


class ConfigError(ValueError):
    """Its message has one line per problem: where, which key, what was found, what was expected."""


@dataclass
class _Given:
    """What was given: values by key, the place of each by its path, and problems as (place in order, message)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple, str] = field(default_factory=dict)  # ("lr",): "train.yaml:3: lr" or "--lr"
    problems: list[tuple[str, str]] = field(default_factory=list)  # key, whole line
    size: int = 0  # values read


def load_config(
    config_class: type[ConfigClass],
    path: str | None,
    options: Sequence[str] = (),
    extra_config_folder: Path | None = None,
) -> ConfigClass:
    """The configuration in the YAML file `path`, where `options` (`--lr 3e-5`, `--lr=3e-5`, `--flag`) win.

    `path` is looked up from the current folder, then in `extra_config_folder`; None: there is no file. Raises
    ConfigError with all problems: those of single keys, or where there is none, those of keys that do not fit.
    """
    here = current_folder()
    file = None if path is None else find_config(path, extra_config_folder)
    given = _Given() if file is None else _read_file(file, config_class)
    _read_options(options, config_class, given)
    folders = [here] if file is None else [here, file.parent]
    config = None
    try:
        config = config_class.model_validate(given.values, context={"folders": folders})
    except ValidationError as error:
        given.problems += _problems(error, config_class, given, "--" if file is None else f"{_shown(file)}: ")
    if given.problems:
        order = {path[0]: number for number, path in enumerate(given.places)}
        lines = sorted(given.problems, key=lambda problem: order.get(problem[0], len(order)))
        raise ConfigError("\n".join(line for _, line in lines))
    return config


def asked_value(key: str, arguments: Sequence[str], config_folders: Sequence[Path]) -> Any:
    """What the last option `--key` says or, without one, the file of `--config`, before it is known which configuration
    they are for. None where neither says anything, and for a file that `load_config` will refuse. Raises ConfigError
    for `--config` without a name."""
    path, options = split_arguments(arguments)
    given = _Given()
    _read_options(options, Config, given)
    for folder in config_folders if path is not None and key not in given.values else ():
        with suppress(ConfigError):
            file = find_config(path, folder)
            values = _parse_yaml(_read_text(file, str(file)), _Given(), str(file))
            return values.get(key) if isinstance(values, dict) else None
    return given.values.get(key)


def _problems(
    error: ValidationError, config_class: type[Config], given: _Given, missing_place: str
) -> Iterator[tuple[str, str]]:
    """(key, line) for each wrong key. A union has an error for each of its types: ours or the deepest counts."""
    worst: dict[Any, tuple] = {}
    for entry in error.errors(include_url=False):
        path = entry["loc"][:1]
        for part in entry["loc"][1:]:  # it also holds the types of a union
            path = (*path, part) if (*path, part) in given.places else path
        rank = (entry["type"] in OUR_MESSAGES, len(path))
        if path[0] not in worst or rank > worst[path[0]][0]:
            worst[path[0]] = (rank, path, entry)
    for key, (_, path, entry) in worst.items():
        message = error_message(key, entry, config_class, nested=len(path) > 1)
        yield key, f"{given.places.get(path, f'{missing_place}{key}')}: {message}"


def error_message(key: str, entry: Mapping[str, Any], config_class: type[Config], nested: bool) -> str:
    """One of pydantic's errors in our words."""
    if entry["type"] in OUR_MESSAGES:
        return entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "extra_forbidden" and not nested:
        nearest = " or ".join(difflib.get_close_matches(key, [*config_class.model_fields, *config_class.aliases], n=3))
        return f"unknown key; did you mean {nearest}?" if nearest else "unknown key; --help_all lists all keys"
    if nested:
        return f"{entry['msg']}, found {shown_value(entry['input'])}"
    if entry["type"] == "missing":
        return f"is missing; expected {expected(config_class.model_fields[key])}"
    return f"expected {expected(config_class.model_fields[key])}, found {shown_value(entry['input'])}"


# The file


def find_config(name: str, extra_config_folder: Path | None = None) -> Path:
    """The existing file `name`, from the current folder or else from `extra_config_folder`."""
    places = places_of(name, [current_folder()] + ([extra_config_folder] if extra_config_folder else []))
    for place in places:
        if os.path.exists(place) and not os.path.isdir(place):
            return place
    if any(map(os.path.isdir, places)):
        raise ConfigError(f"{name}: is a folder; expected a YAML file")
    raise ConfigError(f"{name}: no such file; looked for {' and '.join(map(str, places))}")


def current_folder() -> Path:
    """Raises ConfigError where it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder no longer exists; change to a folder that does") from None


def _shown(file: Path) -> str:
    here = current_folder()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _read_file(file: Path, config_class: type[Config]) -> _Given:
    shown, given = _shown(file), _Given()
    text = _read_text(file, shown)
    values = _parse_yaml(text, given, shown, config_class.aliases)
    if not isinstance(values, dict):
        content = "is empty" if values is None else f"found a {'list' if isinstance(values, list) else 'text'}"
        example = f"`{next(iter(config_class.model_fields))}: VALUE`"
        raise ConfigError(f"{shown}: {content}; expected lines such as {example}")
    given.values = values
    return given


def _read_text(file: Path, shown: str) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{shown}: is larger than {MAX_BYTES:,} bytes; expected a YAML file of keys and values")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"0x{content[error.start]:02x}"
        raise ConfigError(f"{shown}:{line}: expected UTF-8 text, found byte {byte}; save it as UTF-8") from error


class _Loader(yaml.BaseLoader):
    """Every plain scalar is text; a tag such as !!int is kept and refused."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        return {yaml.ScalarNode: PLAIN_TAGS[0], yaml.SequenceNode: PLAIN_TAGS[1], yaml.MappingNode: PLAIN_TAGS[2]}[kind]


def _parse_yaml(text: str, given: _Given, shown: str, aliases: Mapping[str, str] | None = None) -> Any:
    """Texts, None, lists and dicts; places and duplicates go into `given`. Raises ConfigError."""
    try:
        root = _Loader(text).get_single_node()
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
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{shown}: broken YAML: a character beyond Unicode, such as \\U00110000") from error
    return None if root is None else _convert(root, (), given, shown, aliases or {})


def _convert(node: yaml.Node, path: tuple, given: _Given, shown: str, aliases: Mapping[str, str]) -> Any:
    """aliases: other names of the keys at the top."""
    place = f"{shown}:{node.start_mark.line + 1}"
    given.size += 1
    if given.size > MAX_VALUES or len(path) > MAX_DEPTH:
        limits = f"{MAX_VALUES:,} values, with those of aliases, and {MAX_DEPTH} levels"
        raise ConfigError(f"{place}: lists or maps nested too deeply or too large; expected at most {limits}")
    if node.tag not in PLAIN_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ConfigError(f"{place}: found the tag {tag}; write the value without a tag")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, place)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            item_place = f"{shown}:{item.start_mark.line + 1}: {_dotted((*path, number))}"
            given.places.setdefault((*path, number), item_place)
        return [_convert(item, (*path, number), given, shown, {}) for number, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = f"{shown}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{key_line}: expected the name of a key, found a list or map")
        key = aliases.get(key_node.value, key_node.value)
        key_path, key_place = (*path, key), f"{key_line}: {_dotted((*path, key_node.value))}"
        if key in values:
            first = given.places[key_path]
            given.problems.append((key_path[0], f"{key_place}: given twice, first at {first}; keep one"))
            continue
        given.places[key_path] = key_place
        values[key] = _convert(value_node, key_path, given, shown, {})
    return values


def _scalar(node: yaml.ScalarNode, place: str) -> str | None:
    if node.value in (PLAIN_ABSENT if node.style is None else ABSENT):
        return None
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise ConfigError(f"{place}: broken YAML: half a surrogate pair, such as \\ud83d, is no character")
    return node.value


def _dotted(path: tuple) -> str:
    """train_dataset[1].weight"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


# The command line


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


def _read_options(arguments: Sequence[str], config_class: type[Config], given: _Given) -> None:
    """`--key value`, `--key=value` (for a value that begins with --), and `--key` alone for true; dashes and
    underscores are the same; of equal keys the last one wins, also over what the file gives."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            given.problems.append((argument, f"{argument}: unexpected; options are written --key value"))
            continue
        name, equals, text = argument[2:].partition("=")
        key = name.replace("-", "_")
        key = config_class.aliases.get(key, key)
        key_field = config_class.model_fields.get(key)
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and key_field is not None:
            if parts_of(key_field)[0][0] is not bool:
                line = f"--{name}: needs a value; expected {expected(key_field)}"
                given.problems.append((key, line))
                continue
            text = "true"
        for path in [path for path in given.places if path[0] == key]:
            del given.places[path]
        given.places[(key,)] = f"--{name}"
        given.problems = [problem for problem in given.problems if problem[0] != key]
        given.values[key] = text if key_field is None else _option_value(text, parts_of(key_field), f"--{name}")


def _option_value(text: str, parts: list[tuple[Any, tuple]], shown: str) -> Any:
    """parts: the types that the key takes."""
    if any(Escaped() in metadata for _, metadata in parts):
        text = re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)
        return None if text in PLAIN_ABSENT and text else text
    if text.startswith("[") and any(get_origin(kind) in (list, tuple) for kind, _ in parts):
        return _parse_yaml(text, _Given(), shown)
    return None if text in PLAIN_ABSENT else text
