"""The one place that opens a model: what a folder holds, how its model is asked, whether it is trained.

Reranker, evaluate, mine, distill, serve, export and the adapters all come here, so that a folder gives the same scores
everywhere. Training alone calls `from_pretrained`, which takes untrained models too.
"""

import logging
import os
import re

import torch

from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.decoder_template import INSTRUCTION
from rag_retrieval.models.devices import choose_device
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedder_loading import is_reranker
from rag_retrieval.models.embedding_files import is_embedder, known_embedder, saved_representations
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.loading import check_numbers, model_type_of
from rag_retrieval.models.options import EmbedderOptions, ModelOptions, OpeningOptions, model_options
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.prompts import Prompt
from rag_retrieval.models.representations import MULTI_VECTOR
from rag_retrieval.models.settings import (
    CAUSAL,
    FORMAT_NAMES,
    MODEL_TYPES,
    ModelFiles,
    check_is_reranker,
    read_settings,
    resolve_model_path,
)

logger = logging.getLogger(__name__)

NO_EXPORT = "model_type {} is for folders that rag-retrieval export wrote, and {} is none"


def load_reranker(model_name_or_path: str | os.PathLike, **options) -> PairScorer:
    """The trained `CrossEncoder` or `LLMDecoder` in a folder, a hub name or `package:NAME`, in eval mode.

    options: the fields of `ModelOptions`, such as device="cpu" or max_length=256; precision and devices are arguments
    of `compute_score`, and ignored here with a warning. Raises ValueError as `open_scorer`.
    """
    for name in ("precision", "devices"):
        if options.get(name) is not None:
            logger.warning("%s is an argument of compute_score; ignored when a model is loaded", name)
            options[name] = None
    return open_scorer(model_name_or_path, model_options(**options))


def open_scorer(
    model_name_or_path: str | os.PathLike, options: ModelOptions | None = None, question: Prompt | None = None
) -> PairScorer:
    """The model on its device (`options.device`; with `options.devices` on the CPU), in eval mode.

    question: what a language model is asked that is not known to be a reranker and has no formats in the options.
    Raises ValueError for a path that is not there, a folder without weights, weights that are not numbers, a model
    without a trained head, a decoder whose prompt is not known, and options that do not fit.
    """
    options = options or ModelOptions()
    device = first_device(options)
    files = ModelFiles(resolve_model_path(model_name_or_path))
    check_is_reranker(files)
    model_type = choose_model_type(files, options)
    if model_type == CrossEncoder.model_type:
        scorer = CrossEncoder.load(files, options, trained_only=True)
    else:
        check_fields(files, options)
        scorer = LLMDecoder.load(files, options, trained_only=True, question=question)
    check_numbers(files.path, scorer.model)
    return scorer.to(device).eval()


def open_embedder(model_name_or_path: str | os.PathLike, options: EmbedderOptions | None = None) -> EmbeddingModel:
    """The embedding model on its device (`options.device`; with `options.devices` on the CPU), in eval mode.

    A folder that does not say how its vectors are made gets pooling and prompts of the known model of its name
    (known_embedders.json), else those of the options; a plain encoder without either pools by the mean, with a warning.
    Raises ValueError for a path that is not there, a reranker, weights that are not numbers, a decoder that does not
    say how its vectors are made, and options that do not fit.
    """
    options = options or EmbedderOptions()
    device = first_device(options)
    files = ModelFiles(resolve_model_path(model_name_or_path))
    if options.model_type is not None:
        raise ValueError(NO_EXPORT.format(options.model_type, files.path) + "; leave it out")
    model = EmbeddingModel.load(files, options, trained_only=True)
    check_numbers(files.path, model)
    return model.to(device).eval()


def holds_embedder(files: ModelFiles) -> bool:
    """Whether it is an embedding model: its folder says how its vectors are made, or it has the name of a known one."""
    return not is_reranker(files) and (is_embedder(files) or bool(known_embedder(files)))


def holds_token_vectors(files: ModelFiles) -> bool:
    """Whether its model gives token vectors, by which it ranks too. Raises ValueError for a damaged file."""
    # a plain language model, of a hub that cannot be reached say, is not asked for an embedder's files
    plain = files.architecture.endswith(CAUSAL) and not files.module_list
    return not plain and not is_reranker(files) and MULTI_VECTOR in saved_representations(files)


def first_device(options: OpeningOptions) -> torch.device:
    """Where a model is opened: with `devices`, each of which gets a copy, on the CPU."""
    if options.devices and options.device:
        raise ValueError("device and devices are both given; give one of them")
    return choose_device("cpu" if options.devices else options.device)


def choose_model_type(files: ModelFiles, options: ModelOptions) -> str:
    """As given, else as saved, else by the architecture: only folders saved by this library say it."""
    if options.model_type is not None:
        if options.model_type not in MODEL_TYPES:
            raise ValueError(
                NO_EXPORT.format(options.model_type, files.path) + f"; expected one of {', '.join(MODEL_TYPES)}"
            )
        return options.model_type
    saved = read_settings(files.path)
    if saved is not None:
        return saved.model_type
    if files.is_language_model:
        return LLMDecoder.model_type
    return model_type_of(files.path, options.trust_remote_code)


def check_fields(files: ModelFiles, options: ModelOptions) -> None:
    """Raises ValueError for a field such as {text} in a format given here: it would be read as words."""
    saved = read_settings(files.path)
    answers = (options.head or (saved.head if saved else files.is_language_model and "yes_no")) == "yes_no"
    known = ["{}", INSTRUCTION] if answers or options.instruction is not None else ["{}"]
    for name, text in options.given(*FORMAT_NAMES).items():
        for field in re.findall(r"\{[^\W\d]\w*\}", text):
            if field not in known:
                raise ValueError(f"{name}: unknown field {field}; known are {' and '.join(known)}")
