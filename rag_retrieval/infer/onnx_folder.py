"""What lies in an exported folder beside the graph, how pairs are encoded from it and laid out for it.

    model.onnx             input_ids, attention_mask[, token_type_ids] to scores; model.onnx.data with large weights
    tokenizer.json         and the tokenizer's other files
    config.json            of the model that it was made from
    reranker_config.json   its formats in words, for people
    reranker_onnx.json     the description read here
    calibration.json       where the model had one

The fixed parts of a pair are token ids here, not formats. To find them again would need
transformers, and a tokenizer of another version could cut them elsewhere. Nothing here imports torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter
from tokenizers import Tokenizer

from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, PairTemplate, TokenId
from rag_retrieval.models.settings import MODEL_TYPES, check_no_pointers, parsing, read_json
from rag_retrieval.models.token_batch import make_batch, plan_by_tokens

DESCRIPTION_FILE = "reranker_onnx.json"
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1  # of the description; another number is another meaning
OUTPUT = "scores"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], np.ndarray]  # padded inputs, each [pairs, longest] int64, to [pairs] float32


@dataclass(frozen=True)
class OnnxDescription:
    """`reranker_onnx.json`.

    max_length: tokens per pair. inputs: of INPUTS those that the graph has, in order; each is [pairs, longest], int64,
    padded at the right. precision: of the products. source: the model, versions and options it was made from.
    verification: what was measured after the export. The last two are for people, and nothing depends on them.
    """

    __pydantic_config__ = {"extra": "forbid"}

    model_type: Literal[MODEL_TYPES]
    max_length: Annotated[int, Field(strict=True, ge=1)]
    template: PairTemplate
    pad_token_id: TokenId
    inputs: tuple[str, ...]
    precision: Literal["float32", "int8"]
    source: dict[str, Any]
    verification: dict[str, Any]
    format: Literal[FORMAT] = FORMAT


DESCRIPTION = TypeAdapter(OnnxDescription)


def write_description(folder: Path, description: OnnxDescription) -> None:
    text = json.dumps(asdict(description), ensure_ascii=False, indent=2)
    (folder / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")


def read_description(folder: Path) -> OnnxDescription:
    """Raises ValueError for a file that is damaged or of another format, and where the folder lacks a file."""
    path = folder / DESCRIPTION_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{folder}: no {DESCRIPTION_FILE} that can be read ({error.strerror}); give the folder that "
                         "rag-retrieval export wrote") from error  # fmt: skip
    with parsing(path, "export the model again"):
        description: OnnxDescription = DESCRIPTION.validate_json(text)
        expected = INPUTS if description.template.types is not None else INPUTS[:2]
        if description.inputs != expected:
            raise ValueError(f"inputs are {list(description.inputs)}; expected {list(expected)}")
    for name in (MODEL_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name} in it; copy the whole folder, or export the model again")
    check_no_pointers(str(folder))
    return description


def pair_encoder(folder: Path, description: OnnxDescription, max_length: int | None = None) -> PairEncoder:
    """max_length: tokens per pair, None for what the folder says. ValueError for more, which the export did not verify,
    for less than the fixed parts take, and for a damaged tokenizer.json."""
    if max_length is not None and max_length > description.max_length:
        raise ValueError(
            f"max_length {max_length} is more than the {description.max_length} tokens that {folder} was exported "
            "for; export a model with a larger max_len"
        )
    file = folder / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file}: no tokenizer that can be read ({error}); export the model again") from error
    rows = read_json(str(folder), "config.json").get("vocab_size")
    beyond = [token for token, place in tokenizer.get_vocab().items() if isinstance(rows, int) and place >= rows]
    if beyond:
        raise ValueError(
            f"{file}: has tokens beyond the {rows} rows of the model's embedding, such as {min(beyond)!r}; copy the "
            "whole folder, or export the model again"
        )
    split = read_json(str(folder), "tokenizer_config.json").get("split_special_tokens") is True
    split = split or description.model_type == "llm_decoder"
    return PairEncoder(tokenizer, description.template, max_length or description.max_length, split)


def score_padded(
    run: Run,
    pairs: Sequence[EncodedPair],
    names: Sequence[str],
    pad_token_id: int,
    batch_size: int,
    max_tokens: int,
) -> np.ndarray:
    """Scores in input order: [pairs], float32. Which pairs share a forward changes no score beyond float noise, in int8
    neither, where every token has its own scale.

    names: of the inputs that the graph takes. batch_size: pairs of one forward at most. max_tokens: of one forward,
    padding included; a longer pair is computed alone. Longest pairs come first, so that running
    out of memory shows at once.
    """
    scores = np.empty(len(pairs), np.float32)
    parts = plan_by_tokens([[len(pair)] for pair in pairs], max_tokens, padded=True, max_pairs=batch_size)
    for part in parts if pairs else ():
        scores[part] = run(padded_inputs([pairs[position] for position in part], names, pad_token_id))
    return scores


def padded_inputs(pairs: Sequence[EncodedPair], names: Sequence[str], pad_token_id: int) -> Inputs:
    """Right-padded inputs of at least one pair."""
    batch = make_batch(pairs)
    real = np.arange(batch.lengths.max()) < batch.lengths[:, None]
    inputs = {name: np.zeros(real.shape, np.int64) for name in names}
    inputs["input_ids"][~real] = pad_token_id
    inputs["input_ids"][real] = batch.ids
    inputs["attention_mask"][real] = 1
    if "token_type_ids" in inputs:
        inputs["token_type_ids"][real] = batch.types
    return inputs
