"""Folders of models that give something else than dense vectors alone: what their small files say, read and written.

    BGE-M3               a dense model's files; sparse_linear.pt and colbert_linear.pt beside them are the two heads
    SparseEncoder        of sentence-transformers: a masked language model and SpladePooling
    MultiVectorEncoder   of sentence-transformers: Transformer, Dense, MultiVectorMask, Normalize
    ColBERT              of PyLate: Transformer and Dense; the rest in config_sentence_transformers.json
    HF_ColBERT           of Stanford: the projection among the weights; the rest in artifact.metadata

Lexical weights by SPLADE alone are written as a SparseEncoder, token vectors alone as PyLate's ColBERT, which
sentence-transformers opens too, and everything else as BGE-M3. Nothing here imports torch.
"""

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, REPRESENTATIONS
from rag_retrieval.models.settings import ModelFiles, choose_setting, expect, find_file, parsing, read_json
from rag_retrieval.models.text_encoding import PROMPT_NAMES

logger = logging.getLogger(__name__)

LINEAR_FILES = {LEXICAL: "sparse_linear.pt", MULTI_VECTOR: "colbert_linear.pt"}
LINEAR, SPLADE = "linear", "splade"
STANFORD = "HF_ColBERT"
PUNCTUATION = tuple(string.punctuation)  # of ASCII alone, as in ColBERT and PyLate
COLBERT_PROMPTS = {"query": "[Q] ", "document": "[D] "}  # of PyLate, each one token
COLBERT_QUERY_LENGTH, COLBERT_DIM = 32, 128
DOT, MAXSIM, MEAN_MAXSIM = "dot", "maxsim", "meanmaxsim"  # similarities, as sentence-transformers calls them
COLBERT_KEYS = ("query_expansion", "attend_to_expansion_tokens", "skiplist_words")
ELSEWHERE = "open it with sentence_transformers"


@dataclass(frozen=True)
class RepresentationOptions:
    """What is asked of a model in place of what its folder says; None: as the folder says. See
    `EmbeddingModel.from_pretrained`."""

    representations: Sequence[str] | None = None
    lexical: str | None = None
    colbert_dim: int | None = None
    query_expansion: bool | None = None
    attend_to_expansion_tokens: bool | None = None
    skiplist_words: Sequence[str] | None = None


def is_sparse_encoder(files: ModelFiles) -> bool:
    return "SpladePooling" in files.modules or files.sentence_transformers.get("model_type") == "SparseEncoder"


def is_colbert(files: ModelFiles) -> bool:
    kinds = ("ColBERT", "MultiVectorEncoder")
    return files.architecture == STANFORD or files.sentence_transformers.get("model_type") in kinds


# ---- reading --------------------------------------------------------------------------------------------


def read_sparse_encoder(files: ModelFiles) -> dict[str, Any]:
    """Fields of EmbedderSettings. Raises ValueError for modules and a pooling that are not known here."""
    names = [name for name, _ in files.module_list]
    if names not in (["MLMTransformer", "SpladePooling"], ["Transformer", "SpladePooling"]):
        raise ValueError(
            f"{files.path}: a SparseEncoder of the modules {', '.join(names)}; expected MLMTransformer and "
            f"SpladePooling; {ELSEWHERE}"
        )
    file = f"{files.modules['SpladePooling']}/config.json"
    values = read_json(files.path, file)
    for key, known in (("pooling_strategy", "max"), ("activation_function", "relu")):
        if values.get(key, known) != known:
            raise ValueError(f"{files.path}: {file} has {key} {values[key]!r}; known is {known!r}; {ELSEWHERE}")
    similarity = str(files.sentence_transformers.get("similarity_fn_name") or DOT)
    if similarity != DOT:
        raise ValueError(f"{files.path}: its similarity is {similarity}; known for lexical weights is dot; {ELSEWHERE}")
    return {"representations": (LEXICAL,), "lexical": SPLADE, "similarity": DOT}


def read_colbert(files: ModelFiles) -> dict[str, Any]:
    """Fields of EmbedderSettings, and max_length where the files say it."""
    if files.architecture == STANFORD:
        values = read_stanford(files)
    elif files.sentence_transformers.get("model_type") == "ColBERT":
        values = read_pylate(files)
    else:
        values = read_multi_vector_encoder(files)
    similarity = str(files.sentence_transformers.get("similarity_fn_name") or MAXSIM).lower()
    values["similarity"] = similarity if similarity in (MAXSIM, MEAN_MAXSIM) else MAXSIM
    given = {name: value for name, value in values.items() if value is not None}
    return {"representations": (MULTI_VECTOR,), "normalize": True} | given


def read_stanford(files: ModelFiles) -> dict[str, Any]:
    values = read_json(files.path, "artifact.metadata")
    with parsing(f"{files.path}: artifact.metadata"):
        markers = expect(values, "query_token_id", str, "[unused0]"), expect(values, "doc_token_id", str, "[unused1]")
        return {
            "prompts": dict(zip(("query", "document"), (f"{marker} " for marker in markers), strict=True)),
            "query_max_length": expect(values, "query_maxlen", int, COLBERT_QUERY_LENGTH),
            "max_length": expect(values, "doc_maxlen", int),
            "query_expansion": True,
            "attend_to_expansion_tokens": values.get("attend_to_mask_tokens") is True,
            "skiplist_words": PUNCTUATION if values.get("mask_punctuation", True) else (),
        }


def read_pylate(files: ModelFiles) -> dict[str, Any]:
    check_modules(files, "Transformer", "Dense")
    values = files.sentence_transformers
    with parsing(f"{files.path}: config_sentence_transformers.json"):
        saved = {name: text or "" for name, text in expect(values, "prompts", dict, {}).items()}
        for kind, default in COLBERT_PROMPTS.items():
            prefix = values.get(f"{kind}_prefix", default) or ""
            saved[kind] = prefix + saved.get(kind, "").removeprefix(prefix)
        expands = values.get("do_query_expansion") is not False
        return {
            "prompts": {name: text for name, text in saved.items() if text},
            "query_max_length": expect(values, "query_length", int, COLBERT_QUERY_LENGTH),
            "max_length": expect(values, "document_length", int, 180),
            "query_expansion": expands,
            "attend_to_expansion_tokens": expands and values.get("attend_to_expansion_tokens") is True,
            "skiplist_words": tuple(map(str, expect(values, "skiplist_words", list, PUNCTUATION))),
        }


def read_multi_vector_encoder(files: ModelFiles) -> dict[str, Any]:
    check_modules(files, "Transformer", "Dense", "MultiVectorMask", "Normalize")
    if "Normalize" not in files.modules:
        raise ValueError(f"{files.path}: its token vectors are not normalized, as is expected; {ELSEWHERE}")
    mask_file = f"{files.modules.get('MultiVectorMask', '')}/config.json"
    mask, options = read_json(files.path, mask_file), files.transformer_options
    with parsing(f"{files.path}: {mask_file}"):
        words = tuple(map(str, expect(mask, "skiplist_words", list, [])))
        if words and expect(mask, "skiplist_tasks", list, ["document"]) != ["document"]:
            raise ValueError("skiplist_tasks are not the document alone, as is expected")
        if mask.get("keep_only_token_ids"):
            raise ValueError("keep_only_token_ids is not known here")
    with parsing(f"{files.path}: sentence_bert_config.json"):
        length, expansion = expect(options, "query_length", int), expect(options, "query_expansion", dict)
        if expansion is not None:
            fixed = expansion.get("strategy") == "fixed" or length == expansion.get("length")
            if not fixed or expansion.get("token") is not None:
                raise ValueError("query_expansion is known with strategy fixed and the mask token alone")
            length = expect(expansion, "length", int)
    return {
        "query_max_length": length,
        "max_length": options.get("document_length"),
        "query_expansion": expansion is not None,
        "attend_to_expansion_tokens": bool(expansion and expansion.get("attend")),
        "skiplist_words": words,
    }


def check_modules(files: ModelFiles, first: str, *others: str) -> None:
    names = [name for name, _ in files.module_list]
    if names[:1] != [first] or not set(names[1:]) <= set(others):
        raise ValueError(
            f"{files.path}: modules.json names {', '.join(names)}; expected {first}, and any of {', '.join(others)}; "
            f"{ELSEWHERE}"
        )


def heads_in(files: ModelFiles) -> tuple[str, ...]:
    """Of a dense model's folder: which of BGE-M3's heads lie in it."""
    return tuple(name for name, file in LINEAR_FILES.items() if find_file(files.path, file) is not None)


# ---- choosing -------------------------------------------------------------------------------------------


def choose_representations(values: Mapping[str, Any], options: RepresentationOptions) -> dict[str, Any]:
    """values: fields of EmbedderSettings, as the folder says. Returns those that change.

    Raises ValueError for names that are not known and for none.
    """
    saved = values.get("representations", (DENSE,))
    wanted = saved if options.representations is None else tuple(options.representations)
    if not wanted or not set(wanted) <= set(REPRESENTATIONS):
        raise ValueError(f"representations: expected one or more of {', '.join(REPRESENTATIONS)}, found {wanted!r}")
    names = tuple(name for name in REPRESENTATIONS if name in wanted)
    changed: dict[str, Any] = {"representations": names, "lexical": None}
    if LEXICAL in names:
        changed["lexical"] = choose_setting("lexical", options.lexical, values.get("lexical"), LINEAR)
        if changed["lexical"] not in (LINEAR, SPLADE):
            raise ValueError(f"lexical: expected {LINEAR} or {SPLADE}, found {changed['lexical']!r}")
    alone = names == (MULTI_VECTOR,)
    given = {name: value for name in COLBERT_KEYS if (value := getattr(options, name)) is not None}
    if not alone:
        if given:
            logger.warning("%s: for token vectors alone; ignored beside other representations", ", ".join(given))
        changed |= {"query_expansion": False, "attend_to_expansion_tokens": False, "skiplist_words": ()}
        if names == (LEXICAL,) and changed["lexical"] == SPLADE:
            changed["similarity"] = DOT
        elif DENSE not in saved:
            changed["similarity"] = "cosine"
        return changed
    if saved != names:
        changed |= {"query_expansion": True, "attend_to_expansion_tokens": False, "skiplist_words": PUNCTUATION}
        changed |= {"similarity": MAXSIM}
        if values.get("query_max_length") is None:
            changed["query_max_length"] = COLBERT_QUERY_LENGTH
        prompts = values.get("prompts", {})
        own = {kind: text for kind, text in COLBERT_PROMPTS.items() if not prompts.keys() & set(PROMPT_NAMES[kind])}
        changed["prompts"] = dict(prompts) | own
    changed |= given
    if "skiplist_words" in given:
        changed["skiplist_words"] = tuple(given["skiplist_words"])
    return changed


# ---- writing --------------------------------------------------------------------------------------------


def sparse_encoder_files(
    vocabulary: int, is_decoder: bool
) -> tuple[list[tuple[str, str]], dict[str, dict], dict[str, Any]]:
    """Modules as (folder, class), the config of the pooling by its folder, and what a decoder has in
    sentence_bert_config.json. vocabulary: numbers of the output layer."""
    folder = "1_SpladePooling"
    pooling = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": vocabulary}
    modules, transformer = [("", "MLMTransformer"), (folder, "SpladePooling")], {}
    if is_decoder:
        modules[0] = ("", "CausalTransformer")
        transformer = {
            "transformer_task": "text-generation",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"text": {"logits_to_keep": 0}},
        }
    return modules, {folder: pooling}, transformer


def pylate_options(settings: Any, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """Of config_sentence_transformers.json. A prompt that is, or begins with, a token is PyLate's prefix.

    settings: an EmbedderSettings. vocabulary: of the tokenizer.
    """
    prefixes = {}
    for kind, names in PROMPT_NAMES.items():
        prompt = next((settings.prompts[name] for name in names if name in settings.prompts), "")
        candidates = (prompt, prompt.split()[0]) if prompt.strip() else ()
        prefixes[f"{kind}_prefix"] = next((text for text in candidates if text in vocabulary), "")
    return prefixes | {
        "model_type": "ColBERT",
        "query_length": settings.max_lengths["query"],
        "document_length": settings.max_length,
        "do_query_expansion": settings.query_expansion,
        "attend_to_expansion_tokens": settings.attend_to_expansion_tokens,
        "skiplist_words": list(settings.skiplist_words),
        "similarity_fn_name": {MAXSIM: "MaxSim", MEAN_MAXSIM: "meanmaxsim"}[settings.similarity],
    }
