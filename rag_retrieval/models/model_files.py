"""Where a model's files are, and the one small file of ours beside them.

`reranker_config.json` keeps what a plain Hugging Face folder has no place for: the model type, the maximum
length, and a decoder's formats, separator and special token. Without it a caller had to repeat them, and a
mistake would cost quality silently.
"""

import importlib.util
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.utils import cached_file

logger = logging.getLogger(__name__)

SETTINGS_FILE = "reranker_config.json"
PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class RerankerSettings:
    """What `reranker_config.json` holds. Formats, seq and special_token are None for an encoder."""

    model_type: str
    max_len: int
    query_format: str | None = None
    document_format: str | None = None
    seq: str | None = None
    special_token: str | None = None


def resolve_model_path(name: str) -> str:
    """A folder or hub name that transformers can open.

    `package:NAME` is the model that the installed Python package NAME carries in its files. Raises ValueError
    when the package is not installed or does not hold exactly one model folder.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package = name.removeprefix(PACKAGE_PREFIX)
    # find_spec locates the package without importing it: some import half of a framework
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(f"{name}: no Python package {package!r} is installed here; run: pip install {package}")
    root = Path(spec.origin).parent
    folders = sorted({path.parent for path in root.rglob("*.safetensors") if (path.parent / "config.json").is_file()})
    if len(folders) != 1:
        raise ValueError(f"{name}: expected one model folder (config.json, *.safetensors) in {root}, found {len(folders)}")
    return str(folders[0])


def read_settings(model_path: str) -> RerankerSettings | None:
    """The settings saved beside a model, from a folder or the hub; None where there are none."""
    path = cached_file(
        model_path,
        SETTINGS_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    try:
        return RerankerSettings(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: not a settings file of this library ({error}); delete it or save the model anew")


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
