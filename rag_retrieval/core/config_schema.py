"""What a configuration takes: a pydantic class of plain fields, which of them name something outside, all in words.

Easy to get wrong: a list field is read from the command line as names between commas, so its type must be
`list[str]` or `tuple[str, ...]`, alone or beside `str`; a tuple needs a validator that makes it from a list. The
entries of a list may also be mappings (`list[str | dict[str, Any]]`), with a name under `path`.
"""

import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

ABSENT = (None, "None", "none")
DATA_FILE_ENDINGS = (".jsonl", ".json", ".gz", ".parquet")
PATH_BEGINNINGS = (".", "/", "~")
LONGEST_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Schema:
    """A class of configurations, and which of its keys name something outside of the file.

    example: a line, for messages. aliases: other names of keys. models: a folder, a hub name or package:NAME.
    datasets: a file or a hub name. folders, paths: a folder, or anything, that must be there. outputs: may not be.
    A key can be of both models and datasets. files: looked up only where it is written as a data file, any other
    value stays. words: values of a key that name nothing outside, such as `auto`.
    escaped: texts in which \\n, \\t and \\\\ of the command line stand for a newline, a tab and a backslash.
    """

    model: type[BaseModel]
    example: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    folders: Sequence[str] = ()
    paths: Sequence[str] = ()
    files: Sequence[str] = ()
    outputs: Sequence[str] = ()
    escaped: Sequence[str] = ()
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, FieldInfo]:
        return self.model.model_fields


def is_data_file_name(name: str) -> bool:
    """Whether a dataset's name is written as a file; otherwise it is one of the Hugging Face hub."""
    return name.startswith(PATH_BEGINNINGS) or name.endswith(DATA_FILE_ENDINGS)


def problem(message: str) -> PydanticCustomError:
    """What a validator raises so that its message is told as it is."""
    # the message goes in as a value because pydantic fills {} in templates, and formats contain {}
    return PydanticCustomError("problem", "{message}", {"message": message})


def types_of(key: str, schema: Schema) -> list[Any]:
    """The types a key takes besides None, for example [list[str], str]."""
    annotation = schema.keys[key].annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [part for part in parts if part is not NoneType]


def takes_names(key: str, schema: Schema) -> bool:
    return any(get_origin(part) in (list, tuple) for part in types_of(key, schema))


def takes_mappings(key: str, schema: Schema) -> bool:
    """Whether the entries of its list may be mappings, each with a name under `path`."""
    entries = [entry for part in types_of(key, schema) for entry in get_args(part)]
    return any(get_origin(kind) is dict for entry in entries for kind in get_args(entry))


def expected(key: str, schema: Schema) -> str:
    """What a key takes, for messages and help: `a whole number of at least 1`."""
    types, metadata = types_of(key, schema), schema.keys[key].metadata
    if get_origin(types[0]) is Literal:
        return f"one of {', '.join(get_args(types[0]))}"
    if takes_names(key, schema):
        return f"a name or a list of names{' and mappings' if takes_mappings(key, schema) else ''}"
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[types[0]]
    if types[0] is str:
        return "non-empty text" if metadata else kind
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [limit for part in metadata for limit in asdict(part).items()]
    bounds = " and ".join(f"{words[name]} {bound:g}" for name, bound in limits)
    return f"{kind} {'of ' if bounds.startswith('at ') else ''}{bounds}".strip()


def shown_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 4] + " ..."


def message_of(key: str, entry: Mapping[str, Any], value: Any, schema: Schema) -> str:
    """One of pydantic's errors about the value of a key, in our words."""
    if entry["type"] == "problem":
        return entry["msg"]
    if entry["type"] == "missing":
        return f"is missing; expected {expected(key, schema)}"
    if entry["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, [*schema.keys, *schema.aliases], n=3)
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all keys"
        return f"unknown key; {advice}"
    quotes = types_of(key, schema) == [str] and isinstance(value, (bool, int, float))
    return f"expected {expected(key, schema)}, found {shown_value(value)}{'; put it in quotes' if quotes else ''}"


def describe_options(schema: Schema) -> str:
    """Help text: how options are written, then every key with what it takes, its default and its meaning."""
    lines = [
        "Every key of the YAML file is also an option that wins over the file: --key value or --key=value.",
        "None, null, ~ or nothing means absent.",
        *([f"In {', '.join(schema.escaped)}, \\n is a newline."] if schema.escaped else []),
        "",
    ]
    for key, key_field in schema.keys.items():
        lines.append(f"  --{key}: {expected(key, schema)}{_default(key_field)}")
        indent = " " * 6
        lines += textwrap.wrap(key_field.description, 100, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _default(key_field: FieldInfo) -> str:
    if key_field.is_required():
        return " (required)"
    value = key_field.default
    if value is None:
        return ""
    return f" [{','.join(value) if isinstance(value, (list, tuple)) else shown_value(value)}]"
