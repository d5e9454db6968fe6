"""Where a model's files are, and the one small file of ours beside them.

`reranker_config.json` keeps what a plain Hugging Face folder has no place for: the model type, the maximum
length, and a decoder's formats, separator and special token. Without it a caller had to repeat them, and a
mistake would cost quality silently.
"""

import importlib.util
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SETTINGS_FILE = "reranker_config.json"
PACKAGE_PREFIX = "package:"
MODEL_TYPES = ("bert_encoder", "llm_decoder")
FORMAT_NAMES = ("query_format", "document_format", "seq", "special_token")
YES_NO_NAMES = ("instruction", "yes_token", "no_token")
HEADS = ("scalar", "yes_no")


@dataclass(frozen=True)
class RerankerSettings:
    """What `reranker_config.json` holds. Formats, seq and special_token are None for an encoder.

    head: of an LLM decoder that answers yes or no "yes_no", and then it has the three after it; else None.
    """

    model_type: str
    max_len: int
    query_format: str | None = None
    document_format: str | None = None
    seq: str | None = None
    special_token: str | None = None
    head: str | None = None
    instruction: str | None = None
    yes_token: str | None = None
    no_token: str | None = None


def resolve_model_path(name: str | os.PathLike) -> str:
    """A folder or hub name that transformers can open.

    `package:NAME` is the model that the installed Python package NAME carries in its files. Raises ValueError
    for a folder that does not exist or holds no model, and when the package is not installed or does not hold
    exactly one model folder.
    """
    name = os.fspath(name)
    if name.startswith(PACKAGE_PREFIX):
        return package_folder(name.removeprefix(PACKAGE_PREFIX))
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return str(folder)
    if folder.is_file():
        raise ValueError(f"{name}: found a file; expected the folder of a model")
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder (looked from {Path.cwd()})")
    return name  # "bert-base-uncased" or "owner/name": a hub name


def check_model_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    advice = "give the folder of a model"
    if (folder / "model" / "config.json").is_file():
        advice = f"a run keeps its model in {folder / 'model'}"
    elif (folder / "adapter_config.json").is_file():
        advice = "it holds a LoRA adapter; give the folder of the merged model"
    raise ValueError(f"{folder}: no config.json in it; {advice}")


def package_folder(package: str) -> str:
    """The one model folder among the files of an installed package."""
    module = package.replace("-", "_")
    # find_spec locates the package without importing it: some import half of a framework
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{PACKAGE_PREFIX}{package}: no such Python package here; run: pip install {package}"
        )
    root = Path(spec.origin).parent
    folders = sorted(
        {path.parent for path in root.rglob("*.safetensors") if (path.parent / "config.json").is_file()}
    )
    if len(folders) != 1:
        raise ValueError(
            f"{PACKAGE_PREFIX}{package}: expected one model folder (config.json, *.safetensors) in {root}, "
            f"found {len(folders)}"
        )
    return str(folders[0])


def find_file(model_path: str, name: str) -> str | None:
    """Where the file of this name lies in a folder or, for a hub name, in the hub's cache; None where it is not."""
    if Path(model_path).is_dir():
        file = Path(model_path) / name
        return str(file) if file.is_file() else None
    from transformers.utils import cached_file  # takes a second, which a folder need not wait for

    return cached_file(
        model_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def read_settings(model_path: str) -> RerankerSettings | None:
    """The settings saved beside a model, from a folder or the hub; None where there are none.

    Raises ValueError for a file that is damaged.
    """
    path = find_file(model_path, SETTINGS_FILE)
    if path is None:
        return None
    try:
        settings = RerankerSettings(**json.loads(Path(path).read_text(encoding="utf-8")))
        check_settings(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a settings file of this library ({error}); delete it or save the model anew"
        ) from error
    return settings


def check_settings(settings: RerankerSettings) -> None:
    if settings.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, found {settings.model_type!r}")
    if type(settings.max_len) is not int or settings.max_len < 1:
        raise ValueError(f"max_len must be a number of tokens, found {settings.max_len!r}")
    wanted = str if settings.model_type == "llm_decoder" else type(None)
    for name in FORMAT_NAMES:
        if not isinstance(getattr(settings, name), wanted):
            raise ValueError(f"{name} of a {settings.model_type} cannot be {getattr(settings, name)!r}")
    if settings.head not in (None, "yes_no") or (settings.head and settings.model_type != "llm_decoder"):
        raise ValueError(f"head of a {settings.model_type} cannot be {settings.head!r}")
    wanted = str if settings.head else type(None)
    for name in YES_NO_NAMES:
        if not isinstance(getattr(settings, name), wanted):
            raise ValueError(f"{name} of a {settings.head or 'scalar'} head cannot be {getattr(settings, name)!r}")


def write_settings(folder: Path, settings: RerankerSettings) -> None:
    values = {key: value for key, value in asdict(settings).items() if value is not None}
    text = json.dumps(values, ensure_ascii=False, indent=2)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def choose_setting(name: str, given, saved, default):
    """An explicit argument wins over the saved value (with a warning when they differ), then the default."""
    if given is None:
        return default if saved is None else saved
    if saved is not None and given != saved:
        logger.warning("%s=%r given, but the model was saved with %r; using %r", name, given, saved, given)
    return given
