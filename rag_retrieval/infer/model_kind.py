"""What the files of a folder say about the model in it: a trained reranker or not, and of which build.

What a reader would get wrong: transformers loads an embedding model or a plain language model as a reranker without
an error, with a random head. What such a folder gives away, its modules or its architecture, is refused here before
anything is loaded; what it does not, when the weights are there and the head is not among them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rag_retrieval.models.model_files import find_file

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
CLASSIFIER, CAUSAL = "ForSequenceClassification", "ForCausalLM"


@dataclass(frozen=True)
class ModelFiles:
    """What was read of a folder or a hub name.

    config: of config.json. modules: class names in a sentence-transformers folder's modules.json, else empty.
    logit_score: the settings of its LogitScore, which reads a token's logit; None without one. instruction: the
    prompt that it uses by default; None without one. saved_as: what sentence-transformers calls it, "CrossEncoder" or
    another class; "" without. card: README.md, chat_template: of the tokenizer; "" without.
    """

    path: str
    config: dict
    modules: list[str]
    logit_score: dict | None
    instruction: str | None
    saved_as: str
    card: str
    chat_template: str

    @property
    def architecture(self) -> str:
        return next(iter(self.config.get("architectures") or ()), "")

    @property
    def answers(self) -> bool:
        """Whether it is a language model, whose score is the logit of an answer."""
        return self.logit_score is not None or self.architecture.endswith(CAUSAL)


def read_model_files(path: str) -> ModelFiles:
    """Raises ValueError for files that are damaged."""
    entries = read_json(path, "modules.json") or []
    modules = [entry["type"].rpartition(".")[2] for entry in entries]
    places = dict(zip(modules, (entry["path"] for entry in entries), strict=True))
    logit_score = read_json(path, f"{places['LogitScore']}/config.json") if "LogitScore" in places else None
    settings = read_json(path, "config_sentence_transformers.json") or {}
    return ModelFiles(
        path,
        read_json(path, "config.json") or {},
        modules,
        logit_score,
        (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or None,
        settings.get("model_type") or "",
        read_text(path, "README.md"),
        read_text(path, "chat_template.jinja") or template_in_tokenizer(path),
    )


def template_in_tokenizer(path: str) -> str:
    """The chat template where it stands among the tokenizer's settings; some hold several by name, and "" is given."""
    template = (read_json(path, "tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else ""


def read_text(path: str, name: str) -> str:
    file = find_file(path, name)
    return "" if file is None else Path(file).read_text(encoding="utf-8", errors="replace")


def read_json(path: str, name: str):
    file = find_file(path, name)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); copy the file anew") from error


def check_is_reranker(files: ModelFiles) -> None:
    """Raises ValueError for a folder without weights, an embedding model, and a model without a scoring head."""
    if Path(files.path).is_dir():
        check_weights_are_there(Path(files.path))
    if "Pooling" in files.modules and files.saved_as == "CrossEncoder":
        raise ValueError(
            f"{files.path}: a CrossEncoder of the modules {names(files.modules)}, expected Transformer alone or with "
            "LogitScore; open it with sentence_transformers"
        )
    if "Pooling" in files.modules:
        raise ValueError(
            f"{files.path}: modules.json names Pooling, so this is an embedding model; as a reranker its head would "
            "be random. Give a reranker, or train one from it: rag-retrieval train"
        )
    known = not files.architecture or files.architecture.endswith((CLASSIFIER, CAUSAL))
    if not known:
        raise ValueError(
            f"{files.path}: its architecture is {files.architecture}, expected one that ends with {CLASSIFIER} or "
            f"{CAUSAL}; a base or embedding model has no trained head, and its scores would be random. Give a "
            "reranker, or train one from it: rag-retrieval train"
        )


def check_weights_are_there(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ValueError(f"{folder}: no weights in it; expected {names(WEIGHTS)} beside config.json")


def check_head_is_trained(path: str, new_parameters: set[str]) -> None:
    """Raises ValueError where parameters were not in the checkpoint."""
    if new_parameters:
        raise ValueError(
            f"{path}: no trained head in it ({names(sorted(new_parameters))} would be random); is it an embedding "
            "model or a base model? Give a reranker, or train one from it: rag-retrieval train"
        )


def names(values: Sequence[str]) -> str:
    return ", ".join(values)
