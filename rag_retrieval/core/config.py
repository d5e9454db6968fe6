"""What a configuration is: fields with a type, a range and a meaning, which keys depend on others, what names a file.

`config_reader` makes one from a YAML file and options; `MiningConfig(data="folder", ...)` makes one directly. Nothing
here imports torch: a wrong configuration is reported before anything heavy is loaded.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

from annotated_types import BaseMetadata, MinLen
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

ABSENT = (None, "None", "none")  # what means "not given"
PATH_BEGINNINGS = (".", "/", "~")
PACKAGE_NAME = re.compile(r"package:[A-Za-z_][A-Za-z0-9_-]*")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_DATASET = re.compile(HUB_NAME.pattern + r"(@[\w./-]+)?(#[\w.-]+)?")  # with revision and configuration
MAX_SHOWN = 60  # characters of a wrong value in a message


class Only(NamedTuple):
    """To which runs a key applies: in words (`model_type llm_decoder`), and as a function of the configuration."""

    words: str
    applies: Callable[[Any], bool]


RAY = Only("engine ray", lambda config: config.engine == "ray")


def key(
    description: str,
    default: Any = None,
    *,
    only: Only | None = None,
    derive: Callable[[Any], Any] | None = None,
    **limits: Any,
) -> Any:
    """A field of a `Config`. derive: its default from the configuration, where it depends on other keys, which stand
    before it. limits: for pydantic's `Field`. A field without a default is `Field(description=...)`."""
    description = f"{description} Only for {only.words}." if only else description
    return Field(default, description=description, json_schema_extra={"only": only, "derive": derive}, **limits)


class Config(BaseModel):
    """A configuration: fields with a type, a range and a description. Frozen; text is converted to a field's type.

    None means "not given", and the field's default holds; where that is not None and the field takes None
    (`max_grad_norm: None`), None is a value. A key that does not apply to this run (`Only`) is ignored and named in
    `ignored`. Raises pydantic.ValidationError with every wrong value, or where each is valid by itself, with all that
    do not fit each other.

    aliases: other names of keys. main_keys: those that `--help` explains; it only names the others. groups: first key
    of a group of fields, and the group's title in the help. only_for: to which runs inherited keys apply.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    aliases: ClassVar[Mapping[str, str]] = {}
    main_keys: ClassVar[Sequence[str]] = ()
    groups: ClassVar[Mapping[str, str]] = {}
    only_for: ClassVar[Mapping[str, Only]] = {}
    _ignored: dict[str, str] = PrivateAttr(default_factory=dict)  # key that was given, and why it is ignored

    @property
    def ignored(self) -> str | None:
        """One line that names the keys that were given and change nothing in this run; None where all do."""
        names: dict[str, list[str]] = {}
        for name, words in self._ignored.items():
            names.setdefault(words, []).append(name)
        parts = [f"{', '.join(each)} ({words})" for words, each in names.items()]
        return f"ignored in this run: {'; '.join(parts)}" if parts else None

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) for values that do not fit each other."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _leave_out_absent(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in given.items():
            own_name = cls.aliases.get(name, name)
            if own_name in values:
                raise failure(cls, [(own_name, f"given twice, also as {name}; keep one")], values)
            key_field = cls.model_fields.get(own_name)
            if key_field is None or not _is_absent(value, key_field):
                values[own_name] = None if value in ABSENT else value
        return values

    @field_validator("*", mode="after")
    @classmethod
    def _fits_into_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"expected a whole number below 2^63, found {shown_value(value)}")
        return value

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        """Drop what does not apply, derive what was not given, in the order of the fields; then compare keys."""
        values = vars(self)  # a frozen model takes no assignment
        for name, key_field in type(self).model_fields.items():
            only, derive = self.only_for.get(name) or _rule(key_field, "only"), _rule(key_field, "derive")
            if only and not only.applies(self):
                if values[name] != key_field.default:  # `eval_on_start: false` asks for nothing
                    self._ignored[name] = f"only for {only.words}"
                values[name] = key_field.default
            elif derive and name not in self.model_fields_set:
                values[name] = derive(self)
        if problems := list(self.problems()):
            raise failure(type(self), problems, values)
        return self


def _rule(key_field: FieldInfo, name: Literal["only", "derive"]) -> Any:
    return (key_field.json_schema_extra or {}).get(name)


def _is_absent(value: Any, key_field: FieldInfo) -> bool:
    takes_none = NoneType in get_args(key_field.annotation)
    none_is_a_value = takes_none and not key_field.is_required() and key_field.default is not None
    return value in ABSENT and not none_is_a_value


def failure(
    config_class: type[BaseModel], problems: list[tuple[str, str]], values: Mapping[str, Any]
) -> ValidationError:
    """pydantic's error for (key, message) pairs."""
    details = [
        # the message goes in as a value because pydantic fills {} in templates, and formats contain {}
        InitErrorDetails(
            type=PydanticCustomError("problem", "{message}", {"message": text}), loc=(name,), input=values.get(name)
        )
        for name, text in problems
    ]
    return ValidationError.from_exception_data(config_class.__name__, details)


class EngineOptions(Config):
    """Who does the shards of a long work; see `core.shards`."""

    groups: ClassVar[Mapping[str, str]] = {"engine": "Sharing the work"}

    engine: Literal["local", "ray"] = key(
        "Who does the work: local, this process, or all processes of accelerate launch; ray, the workers of a Ray "
        "cluster, all of which must see the files under the same names.",
        "local",
    )
    ray_address: str | None = key(
        "Of a running Ray cluster, such as auto or HOST:6379. Absent: Ray on this machine, for the time of the run.",
        only=RAY, min_length=1,
    )  # fmt: skip
    ray_workers: int | None = key(
        "Ray workers, each with a model of its own. Absent: one for each GPU of the cluster, or without GPUs one for "
        "each machine.",
        only=RAY, ge=1,
    )  # fmt: skip


LOCAL = EngineOptions()


# Texts that name something outside


@dataclass(frozen=True)
class Location:
    """Annotates a text that names a file or folder, which must exist, or a name on the hub or of a package.

    The text becomes an absolute path where the configuration is read by `load_config`, which says in which folders to
    look; otherwise it stays. words: texts that name nothing outside, such as `auto`. is_file_name: whether a text is
    written as a file. only_files: any text that is not stays as it is.
    """

    file: bool = False
    folder: bool = False
    hub: bool = False
    package: bool = False
    words: tuple[str, ...] = ()
    is_file_name: Callable[[str], bool] = lambda name: False
    only_files: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._validate, handler(source))

    def _validate(self, name: str, info: ValidationInfo) -> str:
        return self.find(name, info.context["folders"]) if info.context and name else name

    def find(self, name: str, folders: Sequence[Path]) -> str:
        """An absolute path, or `name` where it is not a path. Raises ValueError."""
        if name in self.words or (self.only_files and not self.is_file_name(name)):
            return name
        if self.package and name.startswith("package:"):
            if PACKAGE_NAME.fullmatch(name):
                return name
            raise ValueError(f"expected the name of a Python package after package:, found {shown_value(name)}")
        places = places_of(name, folders)
        for place in places:
            if os.path.exists(place) if self.file else os.path.isdir(place):
                return str(place)
        is_path = name.startswith(PATH_BEGINNINGS) or self.is_file_name(name)
        hub_name = HUB_DATASET if self.file else HUB_NAME
        if not self.hub or is_path or not hub_name.fullmatch(name):
            kind = " or ".join(["file"] * self.file + ["folder"] * self.folder)
            raise ValueError(f"found no {kind} {name}; looked for {' and '.join(map(str, places))}")
        return name


def places_of(name: str, folders: Sequence[Path]) -> list[Path]:
    """Absolute places where `name` is looked up, in order, each once; none for a name that no file can have."""
    if "\0" in name:
        return []
    return list(dict.fromkeys(Path(os.path.abspath(folder / os.path.expanduser(name))) for folder in folders))


def _split_names(value: Any, info: ValidationInfo) -> Any:
    """Names between commas as a list; the name of an existing file stays one name, whatever characters it has."""
    folders = info.context["folders"] if info.context else ()
    if not isinstance(value, str) or "," not in value or any(map(os.path.exists, places_of(value, folders))):
        return value
    return [name.strip() for name in value.split(",")]


def _list_of_names(value: Any, info: ValidationInfo) -> Any:
    names = _split_names(value, info)
    return [names] if isinstance(names, str) else names


@dataclass(frozen=True)
class Escaped:
    """Annotates a text that may be empty. On the command line \\n is a newline in it, \\t a tab, \\\\ a backslash."""


ModelName = Annotated[str, Location(folder=True, hub=True, package=True)]
FolderPath = Annotated[str, Location(folder=True)]
FileOrFolder = Annotated[str, Location(file=True, folder=True)]
# need not exist
OutputPath = Annotated[str, BeforeValidator(lambda name: os.path.expanduser(name) if isinstance(name, str) else name)]
EscapedText = Annotated[str, Escaped()]
NAMES = BeforeValidator(_list_of_names)  # annotates list[...]: one name, or names between commas, are lists too
NAME_OR_NAMES = BeforeValidator(_split_names)  # annotates str | list[...]: names between commas are a list


# What a key takes, in words


def shown_value(value: Any) -> str:
    """A value for a message: text of one word as it is, everything else as JSON, both cut to 60 characters."""
    try:
        text = value if isinstance(value, str) and re.fullmatch(r"[\w.,:;+/~*%-]+", value) else json.dumps(
            value, ensure_ascii=False, default=str)  # fmt: skip
    except ValueError:  # Python writes no number of over 4,300 digits
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 4] + " ..."


def parts_of(key_field: FieldInfo) -> list[tuple[Any, tuple]]:
    """The types a key takes besides None, each with its annotations: [(str, (Location(...),))]."""
    annotation = key_field.annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    split = [(part.__origin__, part.__metadata__) if get_origin(part) is Annotated else (part, ()) for part in parts]
    return [(kind, (*metadata, *key_field.metadata)) for kind, metadata in split if kind is not NoneType]


def expected(key_field: FieldInfo) -> str:
    """What a key takes, for messages and help: `a whole number of at least 1`."""
    parts = parts_of(key_field)
    kind, metadata = parts[0]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    items = next((get_args(part)[0] for part, _ in parts if get_origin(part) in (list, tuple)), None)
    if get_origin(items) is Literal:
        return f"one or several of {', '.join(map(str, get_args(items)))}, between commas"
    if items is not None:
        return "a name or names between commas"
    if get_origin(kind) is dict:
        is_text = get_args(kind)[1] is str
        return 'texts by name, as {"query": "query: "}' if is_text else 'numbers by name, as {"lexical": 0.1}'
    if kind is str:
        return "non-empty text" if any(isinstance(mark, MinLen) for mark in metadata) else "text"
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [limit for mark in metadata if isinstance(mark, BaseMetadata) for limit in asdict(mark).items()]
    bounds = " and ".join(f"{words[name]} {bound:,.15g}" for name, bound in limits)
    return f"{names.get(kind, 'a value')} {'of ' if bounds.startswith('at ') else ''}{bounds}".strip()
