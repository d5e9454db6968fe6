"""What the small files of an embedding model's folder say, read and written: the layout of sentence-transformers.

    modules.json                        Transformer, 1_Pooling, Dense modules, Normalize, in the order of computation
    1_Pooling/config.json               how token states become a vector
    sentence_bert_config.json           max_seq_length
    config_sentence_transformers.json   prompts, the similarity of vectors
    embedder_config.json                what that layout has no place for: a query's own maximum length, MCLS

Folders with lexical weights or token vectors are in `representation_files`. Models of public families whose folders say
only a part of it are in known_embedders.json, by their names.

They are written with the keys and class names of sentence-transformers before 5.4, which it still reads:
text-embeddings-inference reads no others, and older versions of vLLM would pool in another way without a word. Nothing
here imports torch.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.prompts import names_in
from rag_retrieval.models.representation_files import (
    LINEAR,
    LINEAR_FILES,
    MAXSIM,
    SPLADE,
    STANFORD,
    heads_in,
    is_colbert,
    is_sparse_encoder,
    pylate_options,
    read_colbert,
    read_sparse_encoder,
    sparse_encoder_files,
)
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.settings import ModelFiles, choose_setting, expect, parsing, read_json
from rag_retrieval.models.text_encoding import PROMPT_NAMES

logger = logging.getLogger(__name__)

KNOWN_EMBEDDERS = Path(__file__).with_name("known_embedders.json")

EXTRAS_FILE = "embedder_config.json"
EXTRAS = ("query_max_length", "cls_interval")
POOLING_KEYS = {  # of sentence-transformers before 5.4; None: not known here
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
POOLING_NAMES = {"cls": "cls", "mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last"}
CLASSES = {kind: f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
CLASSES |= {
    "MLMTransformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
    "SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling",
    "CausalTransformer": "sentence_transformers.base.modules.transformer.Transformer",
    "PyLateDense": "pylate.models.Dense.Dense",
}
CLASSES["LatentAttention"] = "rag_retrieval.models.embedding_heads.LatentAttention"  # no other program opens it


@dataclass(frozen=True)
class HeadFiles:
    """A module with weights outside of the Hugging Face model. kind: "Dense" or "LatentAttention". folder: in the
    model's. values: of its config.json."""

    kind: str
    folder: str
    values: dict[str, Any]


@dataclass(frozen=True)
class EmbedderSettings:
    """How a model makes a vector of a text.

    pooling: see `models.pooling`. max_length, query_max_length: tokens of a text, and of a query where it differs.
    prompts: text before a text, by name ("query", "document" or others); default_prompt: name of that of texts without
    a kind. include_prompt: whether its tokens are pooled too. normalize: whether vectors are made to length 1.
    similarity: of vectors, as sentence-transformers calls it. bidirectional: whether a decoder's tokens see those after
    them. cls_interval: see `TextTemplate`. dims: the widths that a Matryoshka model was trained at.
    representations: what a forward gives, in the order of `REPRESENTATIONS`. lexical: how its weights are made,
    "linear" or "splade"; None without them. query_expansion, attend_to_expansion_tokens, skiplist_words: see
    `models.multi_vector`. ensemble_weights: of the scores of several representations, by name, in their sum; empty for
    those of BGE-M3.
    """

    pooling: str
    max_length: int
    query_max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    normalize: bool = True
    similarity: str = "cosine"
    bidirectional: bool = False
    cls_interval: int | None = None
    dims: tuple[int, ...] = ()
    representations: tuple[str, ...] = (DENSE,)
    lexical: str | None = None
    query_expansion: bool = False
    attend_to_expansion_tokens: bool = False
    skiplist_words: tuple[str, ...] = ()
    ensemble_weights: dict[str, float] = field(default_factory=dict)

    @property
    def is_colbert(self) -> bool:
        """Whether token vectors are all that the model gives."""
        return self.representations == (MULTI_VECTOR,)

    @property
    def is_splade_alone(self) -> bool:
        return self.representations == (LEXICAL,) and self.lexical == SPLADE

    @property
    def multi_vector_mean(self) -> bool:
        """Whether a MaxSim is divided by the number of the query's vectors: as in BGE-M3, but not in ColBERT."""
        return not self.is_colbert or self.similarity != MAXSIM

    @property
    def max_lengths(self) -> dict[str, int]:
        """Of texts, by kind, in tokens."""
        return {"document": self.max_length, "query": self.query_max_length or self.max_length}

    @property
    def reads_one_token(self) -> bool:
        return self.pooling in ("cls", "last") and self.cls_interval is None


# ---- reading --------------------------------------------------------------------------------------------


def is_embedder(files: ModelFiles) -> bool:
    """Whether the folder says how its vectors are made."""
    return bool(files.module_list) or files.architecture == STANFORD or bool(heads_in(files))


def read_settings(files: ModelFiles) -> dict[str, Any]:
    """Those fields of EmbedderSettings that the files say, max_length only where ColBERT's files do.

    Raises ValueError for a damaged file, and for a module or pooling that is not known here.
    """
    values: dict[str, Any] = {}
    config = files.config
    with parsing(f"{files.path}: config.json"):
        if config.get("is_causal") is False:
            values["bidirectional"] = True
        values["dims"] = tuple(map(int, expect(config, "matryoshka_dimensions", list, [])))
    options = files.sentence_transformers
    with parsing(f"{files.path}: config_sentence_transformers.json"):
        prompts = expect(options, "prompts", dict, {})
        if prompts:
            values["prompts"] = {name: expect(prompts, name, str) for name in prompts if prompts[name]}
        values["default_prompt"] = expect(options, "default_prompt_name", str)
        values["similarity"] = expect(options, "similarity_fn_name", str, "cosine")
    values["representations"] = saved_representations(files)
    extras = read_json(files.path, EXTRAS_FILE)
    with parsing(f"{files.path}: {EXTRAS_FILE}"):
        values |= {name: expect(extras, name, int) for name in EXTRAS if extras.get(name) is not None}
        values["lexical"] = expect(extras, "lexical", str, LINEAR if LEXICAL in values["representations"] else None)
        weights = expect(extras, "ensemble_weights", dict, {})
        values["ensemble_weights"] = {name: float(weight) for name, weight in weights.items()}
    if is_sparse_encoder(files):
        values |= read_sparse_encoder(files)
    elif is_colbert(files):
        values |= read_colbert(files)
    elif not files.module_list:
        if heads_in(files):  # as FlagEmbedding's trainer leaves it
            values["pooling"] = "cls"
    else:
        check_modules(files)
        values["normalize"] = "Normalize" in files.modules
        values |= read_pooling(files)
        if "LatentAttention" in files.modules:
            values["pooling"] = "latent_attention"
    return values


def saved_representations(files: ModelFiles) -> tuple[str, ...]:
    """Those that the folder's model gives. Raises ValueError for a damaged file, but checks no modules."""
    if is_sparse_encoder(files):
        return (LEXICAL,)
    if is_colbert(files):
        return (MULTI_VECTOR,)
    extras = read_json(files.path, EXTRAS_FILE)
    with parsing(f"{files.path}: {EXTRAS_FILE}"):
        return tuple(map(str, expect(extras, "representations", list, [DENSE, *heads_in(files)])))


def known_embedder(files: ModelFiles) -> dict[str, Any]:
    """pooling, prompts and eos_token (of decoders, else None) of a model of known_embedders.json, empty for others.

    A model is known by its name on the hub or of its folder, and a plain one, which does not say how its vectors are
    made, also by what its files say it was made from.
    """
    path = Path(files.path)
    in_cache = (part.rpartition("--")[2] for part in path.parts if part.startswith("models--"))  # of the hub
    names = [path.name, *in_cache]
    names += [] if is_embedder(files) else names_in(files).splitlines()
    own = {name.rstrip("/").rpartition("/")[2].lower() for name in names}
    for known in json.loads(KNOWN_EMBEDDERS.read_text(encoding="utf-8")):
        if own & {name.rpartition("/")[2].lower() for name in known["models"]}:
            return {"pooling": known["pooling"], "prompts": known["prompts"], "eos_token": known.get("eos_token")}
    return {}


def check_modules(files: ModelFiles) -> None:
    """Raises ValueError unless the modules are Transformer, LatentAttention or not, Pooling, any Dense, Normalize or
    not."""
    names = [name for name, _ in files.module_list]
    if not re.fullmatch("Transformer (LatentAttention )?Pooling( Dense)*( Normalize)?", " ".join(names)) or (
        files.module_list[0][1]
    ):
        raise ValueError(
            f"{files.path}: modules.json names {', '.join(names)}; expected Transformer (in the folder itself), "
            "Pooling, any number of Dense, and Normalize or not; open it with sentence_transformers"
        )


def read_pooling(files: ModelFiles) -> dict[str, Any]:
    """pooling and include_prompt, under the keys before and after sentence-transformers 5.4."""
    file = f"{files.modules['Pooling']}/config.json"
    values = read_json(files.path, file)
    with parsing(f"{files.path}: {file}"):
        modes = values.get("pooling_mode", [key for key in POOLING_KEYS if values.get(key) is True])
        modes = [modes] if isinstance(modes, str) else list(map(str, modes))
    poolings = [(POOLING_NAMES | POOLING_KEYS).get(mode) for mode in modes]
    if len(poolings) != 1 or poolings[0] is None:
        raise ValueError(
            f"{files.path}: {file} pools by {' and '.join(modes) or 'nothing'}; expected one of "
            f"{', '.join(POOLING_NAMES)}; open it with sentence_transformers"
        )
    return {"pooling": poolings[0], "include_prompt": values.get("include_prompt") is not False}


# ---- choosing --------------------------------------------------------------------------------------------


def check_pooling_is_known(path: str, is_decoder: bool, trained_only: bool) -> None:
    """Of a folder that does not say how it pools, where the caller does not say it either."""
    if not trained_only:
        logger.info("%s does not say how it pools: %s", path, "last token" if is_decoder else "mean")
    elif is_decoder:
        raise ValueError(
            f"{path}: a decoder that does not say how its vectors are made; give pooling, and prompts where it was "
            'trained with some, such as pooling="last", prompts={"query": "..."}'
        )
    else:
        logger.warning("%s does not say how it pools, and is taken to pool by the mean; give pooling", path)


def choose_settings(
    values: dict[str, Any], options: EmbedderOptions, dims: Sequence[int] | None, max_length: int, bidirectional: bool
) -> EmbedderSettings:
    """values: what the folder says. What is given wins, with a warning."""
    given = options.given("pooling", "query_max_length", "include_prompt", "cls_interval", "normalize")
    chosen = values | {name: choose_setting(name, value, values.get(name), None) for name, value in given.items()}
    queries = chosen.get("query_max_length")
    if options.max_length is not None and options.query_max_length is None and queries is not None:
        chosen["query_max_length"] = min(queries, options.max_length)  # a limit that is given holds for every text
    given_prompts = options.prompts or {}
    replaced = {name for names in PROMPT_NAMES.values() if given_prompts.keys() & set(names) for name in names}
    # one of another name for the same kind would be used in place of the one given
    prompts = {name: prompt for name, prompt in values.get("prompts", {}).items() if name not in replaced}
    prompts |= given_prompts
    chosen |= {"prompts": prompts, "max_length": max_length, "bidirectional": bidirectional}
    if dims is not None:
        chosen["dims"] = tuple(dims)
    return EmbedderSettings(**chosen)


def check_settings(path: str, settings: EmbedderSettings, causal: bool) -> None:
    """Raises ValueError for settings that do not fit each other."""
    is_cls = settings.pooling == "cls"
    if causal and is_cls:
        raise ValueError(f"{path}: pooling cls reads the first token, which in a decoder sees no other; give last")
    if settings.cls_interval is not None and not is_cls:
        raise ValueError(f"{path}: cls_interval is for pooling cls, and pooling is {settings.pooling}; leave it out")
    if is_cls and not settings.include_prompt:
        raise ValueError(f"{path}: include_prompt false is for poolings of all tokens, and pooling is cls")


# ---- writing --------------------------------------------------------------------------------------------


def write_settings(
    folder: Path,
    settings: EmbedderSettings,
    width: int,
    heads: Sequence[HeadFiles],
    vocabulary: Mapping[str, int],
    is_decoder: bool = False,
) -> None:
    """Beside the weights, config and tokenizer that lie in `folder`. width: of the model's states, or with
    SPLADE alone of its logits. vocabulary: of the tokenizer."""
    options = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""} | settings.prompts,
        "default_prompt_name": settings.default_prompt,
        "similarity_fn_name": settings.similarity,
    }
    transformer = {"max_seq_length": settings.max_length, "do_lower_case": False}
    files = {each.folder: each.values for each in heads}
    if settings.is_splade_alone:
        modules, pooling, of_transformer = sparse_encoder_files(width, is_decoder)
        options |= {"model_type": "SparseEncoder", "similarity_fn_name": "dot"}
        transformer |= of_transformer
        files |= pooling
    elif settings.is_colbert:
        modules = [("", "Transformer"), *((each.folder, "PyLateDense") for each in heads)]
        options |= pylate_options(settings, vocabulary)
    else:
        modules, pooling = dense_modules(settings, width, heads)
        files |= pooling
    entries = [
        {"idx": place, "name": str(place), "path": path, "type": CLASSES[kind]}
        for place, (path, kind) in enumerate(modules)
    ]
    write(folder / "modules.json", entries)
    for path, values in files.items():
        write(folder / path / "config.json", values)
    if modules[-1][1] == "Normalize":
        (folder / modules[-1][0]).mkdir(exist_ok=True)
    write(folder / "sentence_bert_config.json", transformer)
    write(folder / "config_sentence_transformers.json", options)
    extras = {name: value for name in EXTRAS if (value := getattr(settings, name)) is not None}
    as_bge_m3 = not settings.is_colbert and not settings.is_splade_alone
    if as_bge_m3 and settings.representations != (DENSE,):
        extras |= {"representations": list(settings.representations), "lexical": settings.lexical}
    if settings.ensemble_weights:
        extras["ensemble_weights"] = settings.ensemble_weights
    (folder / EXTRAS_FILE).unlink(missing_ok=True)
    if extras:
        write(folder / EXTRAS_FILE, extras)
    for file in LINEAR_FILES.values():  # of another model that lay there
        (folder / file).unlink(missing_ok=True)


def dense_modules(
    settings: EmbedderSettings, width: int, heads: Sequence[HeadFiles]
) -> tuple[list[tuple[str, str]], dict[str, dict]]:
    """(folder, class) of each module, and the config of the pooling by its folder."""
    latent = [each for each in heads if each.kind == "LatentAttention"]
    folder = f"{1 + len(latent)}_Pooling"
    modules = [("", "Transformer"), *((each.folder, each.kind) for each in latent), (folder, "Pooling")]
    modules += [(each.folder, each.kind) for each in heads if each not in latent]
    if settings.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    pooling = {"word_embedding_dimension": width}
    own = "mean" if latent else settings.pooling
    pooling |= {key: name == own for key, name in POOLING_KEYS.items()}
    return modules, {folder: pooling | {"include_prompt": settings.include_prompt}}


def write(path: Path, values: dict | list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
