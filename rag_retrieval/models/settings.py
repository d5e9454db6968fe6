"""Where a model's files are, and what its small files say: our settings, those of sentence-transformers, the card.

`reranker_config.json` keeps what a plain Hugging Face folder has no place for: the model type, the maximum length,
the formats of query and document, and a decoder's separator, special token and answers. Nothing here imports torch.
"""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rag_retrieval.core.files import content_of

logger = logging.getLogger(__name__)

SETTINGS_FILE = "reranker_config.json"
PACKAGE_PREFIX = "package:"
MODEL_TYPES = ("bert_encoder", "llm_decoder")
TEXT_FORMATS = ("query_format", "document_format")
FORMAT_NAMES = (*TEXT_FORMATS, "seq", "special_token")
YES_NO_NAMES = ("instruction", "yes_token", "no_token")
LARGEST_SIDE_FILE = 20_000_000  # bytes of a settings file or card
CLASSIFIER, CAUSAL = "ForSequenceClassification", ("ForCausalLM", "LMHeadModel")


# ---- paths ----------------------------------------------------------------------------------------------


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


def model_content(name: str) -> str:
    """What identifies a model: a digest of all that its folder holds, or its name on the hub."""
    path = Path(resolve_model_path(name))
    return content_of(path) if path.is_dir() else name


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
        raise ValueError(f"{PACKAGE_PREFIX}{package}: no such Python package here; run: pip install {package}")
    root = Path(spec.origin).parent
    folders = sorted({path.parent for path in root.rglob("*.safetensors") if (path.parent / "config.json").is_file()})
    if len(folders) != 1:
        raise ValueError(
            f"{PACKAGE_PREFIX}{package}: expected one model folder (config.json, *.safetensors) in {root}, "
            f"found {len(folders)}"
        )
    return str(folders[0])


def find_file(model_path: str, name: str) -> Path | None:
    """The file of this name in a folder or of a hub name; None where the model has no such file.

    Raises ValueError where that cannot be known: the hub cannot be reached and its cache does not say.
    """
    if Path(model_path).is_dir():
        file = Path(model_path) / name
        return file if file.is_file() else None
    return find_hub_file(model_path, name)


def find_hub_file(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    nowhere = f"{repository}: no such folder (looked from {Path.cwd()}), and as a name on the hub"
    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:  # the hub cannot be reached
        if not isinstance(try_to_load_from_cache(repository, "config.json"), str):
            raise ValueError(
                f"{nowhere} neither reachable nor in the cache; give a folder, or with a connection run: "
                f"hf download {repository}"
            ) from error
        # the cache notes files that the hub lacks, and .gitattributes is there only where all files were fetched
        known_absent = try_to_load_from_cache(repository, name) is not None
        if known_absent or isinstance(try_to_load_from_cache(repository, ".gitattributes"), str):
            return None
        raise ValueError(
            f"{repository}: the hub cannot be reached, and its cache does not say whether this model has a {name}, "
            f"which may change its scores; with a connection run: hf download {repository}"
        ) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{nowhere}: {reason:.300}") from error


# ---- small files ----------------------------------------------------------------------------------------


@contextmanager
def parsing(file: Path | str, advice: str = "copy the file again") -> Iterator[None]:
    """ValueError that names the file for whatever is raised over contents that are not as expected."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{file}: damaged ({reason:.200}); {advice}") from error


def read_text(model_path: str, name: str) -> str:
    """The text of a file of the model, of a long one its beginning; "" where there is none."""
    file = find_file(model_path, name)
    if file is None:
        return ""
    with open(file, encoding="utf-8", errors="replace") as opened:
        return opened.read(LARGEST_SIDE_FILE)


def read_json(model_path: str, name: str, kind: type = dict) -> Any:
    """The contents of a JSON file of the model, empty where there is none. Raises ValueError unless it is a `kind`."""
    file = find_file(model_path, name)
    if file is None:
        return kind()
    with parsing(file):
        if file.stat().st_size > LARGEST_SIDE_FILE:
            raise ValueError(f"{file.stat().st_size:,} bytes, expected a few thousand")
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, kind):
            raise TypeError(f"expected {'an object' if kind is dict else 'a list'}, found {type(values).__name__}")
    return values


def expect(values: dict, name: str, kind: type, default: Any = None) -> Any:
    """The value of a key, `default` where it is absent or null. Raises TypeError for another type."""
    value = values.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected {kind.__name__}")
    return default if value is None else value


# ---- our settings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RerankerSettings:
    """What `reranker_config.json` holds.

    query_format, document_format: of an encoder None stands for "{}". seq, special_token: of a decoder.
    head: "yes_no" for a decoder that answers yes or no, which then has the three after it; else None.
    start_layer: of a decoder with a head at several layers, the first that has one, counted from 1; else None.
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
    start_layer: int | None = None


def read_settings(model_path: str) -> RerankerSettings | None:
    """The settings saved beside a model, from a folder or the hub; None where there are none.

    Raises ValueError for a file that is damaged or cannot be read.
    """
    path = find_file(model_path, SETTINGS_FILE)
    if path is None:
        return None
    with parsing(path, "delete it or save the model again"):
        settings = RerankerSettings(**json.loads(path.read_text(encoding="utf-8")))
        check_settings(settings)
    return settings


def check_settings(settings: RerankerSettings) -> None:
    if settings.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, found {settings.model_type!r}")
    if type(settings.max_len) is not int or settings.max_len < 1:
        raise ValueError(f"max_len must be a number of tokens, found {settings.max_len!r}")
    is_decoder = settings.model_type == "llm_decoder"
    if settings.start_layer is not None and (type(settings.start_layer) is not int or settings.head or not is_decoder):
        raise ValueError(f"start_layer of a {settings.model_type} cannot be {settings.start_layer!r}")
    for name in FORMAT_NAMES:
        required = (str,) if is_decoder else (str, type(None)) if name in TEXT_FORMATS else (type(None),)
        if not isinstance(getattr(settings, name), required):
            raise ValueError(f"{name} of a {settings.model_type} cannot be {getattr(settings, name)!r}")
    if settings.head not in (None, "yes_no") or (settings.head and not is_decoder):
        raise ValueError(f"head of a {settings.model_type} cannot be {settings.head!r}")
    required = str if settings.head else type(None)
    for name in YES_NO_NAMES:
        if not isinstance(getattr(settings, name), required):
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


# ---- what other programs wrote --------------------------------------------------------------------------


class ModelFiles:
    """What the small files of a folder or a hub name say, written here or by other programs; each is read when needed.

    Every property raises ValueError that names the file where it is damaged.
    """

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def config(self) -> dict:
        return read_json(self.path, "config.json")

    @cached_property
    def architecture(self) -> str:
        """The class that config.json names, "" where it names none."""
        config = self.config
        with parsing(f"{self.path}: config.json"):
            return next(iter(map(str, expect(config, "architectures", list, []))), "")

    @cached_property
    def module_list(self) -> list[tuple[str, str]]:
        """Of sentence-transformers: (name of its class, folder) of each module, in the order of computation."""
        entries = read_json(self.path, "modules.json", list)
        with parsing(f"{self.path}: modules.json"):
            return [(expect(entry, "type", str, "").rpartition(".")[2], expect(entry, "path", str, ""))
                    for entry in entries]  # fmt: skip

    @property
    def modules(self) -> dict[str, str]:
        """The folder of each module by the name of its class."""
        return dict(self.module_list)

    @cached_property
    def logit_score(self) -> dict | None:
        """The settings of sentence-transformers' LogitScore, which reads a token's logit; None without one."""
        if "LogitScore" not in self.modules:
            return None
        return read_json(self.path, f"{self.modules['LogitScore']}/config.json")

    @cached_property
    def sentence_transformers(self) -> dict:
        return read_json(self.path, "config_sentence_transformers.json")

    @cached_property
    def default_prompt(self) -> str | None:
        """The text that sentence-transformers puts before a query, or gives a chat template as the instruction."""
        options = self.sentence_transformers
        with parsing(f"{self.path}: config_sentence_transformers.json"):
            name = expect(options, "default_prompt_name", str)
            return expect(expect(options, "prompts", dict, {}), name, str) or None

    @cached_property
    def transformer_options(self) -> dict:
        """max_seq_length and do_lower_case, where sentence-transformers keeps them."""
        return read_json(self.path, "sentence_bert_config.json")

    @cached_property
    def max_seq_length(self) -> int | None:
        options = self.transformer_options
        with parsing(f"{self.path}: sentence_bert_config.json"):
            return expect(options, "max_seq_length", int)

    @cached_property
    def card(self) -> str:
        return read_text(self.path, "README.md")

    @cached_property
    def chat_template(self) -> str:
        """That of the tokenizer, "" without one and where there are several by name."""
        template = read_text(self.path, "chat_template.jinja")
        in_settings = read_json(self.path, "tokenizer_config.json").get("chat_template")
        return template or (in_settings if isinstance(in_settings, str) else "")

    @property
    def is_language_model(self) -> bool:
        """Whether its score is the logit of an answer, if it is a reranker at all."""
        return self.logit_score is not None or self.architecture.endswith(CAUSAL)


def check_is_reranker(files: ModelFiles) -> None:
    """Raises ValueError for a folder without weights, an embedding model, and a model without a scoring head.

    transformers opens all of these as rerankers with a random head.
    """
    folder, patterns = Path(files.path), ("*.safetensors", "pytorch_model*.bin")
    if folder.is_dir() and not any(file for pattern in patterns for file in folder.glob(pattern)):
        raise ValueError(f"{folder}: no weights in it; expected {', '.join(patterns)} beside config.json")
    if "Pooling" in files.modules and files.sentence_transformers.get("model_type") == "CrossEncoder":
        raise ValueError(
            f"{files.path}: a CrossEncoder of the modules {', '.join(files.modules)}, expected Transformer alone or "
            "with LogitScore; open it with sentence_transformers"
        )
    if "Pooling" in files.modules:
        raise ValueError(
            f"{files.path}: modules.json names Pooling, so this is an embedding model; as a reranker its head would "
            "be random. Give a reranker, or train one from it: rag-retrieval train"
        )
    if files.architecture and not files.architecture.endswith((CLASSIFIER, *CAUSAL)):
        raise ValueError(
            f"{files.path}: its architecture is {files.architecture}, expected one that ends with "
            f"{', '.join((CLASSIFIER, *CAUSAL))}; a base or embedding model has no trained head, and its scores would "
            "be random. Give a reranker, or train one from it: rag-retrieval train"
        )


def check_no_pointers(model_path: str) -> None:
    """Raises ValueError for weights or tokenizer files of which only Git LFS's pointer is there."""
    for file in sorted(Path(model_path).glob("*")) if Path(model_path).is_dir() else ():
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{file}: a pointer of Git LFS, not the file itself; run git lfs pull where it was cloned, or fetch "
                "the model with: hf download"
            )
