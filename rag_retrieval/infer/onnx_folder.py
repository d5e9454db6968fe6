"""What lies in an exported folder beside the graph, how texts are encoded from it and laid out for it.

    model.onnx             input_ids, attention_mask[, token_type_ids] to scores; model.onnx.data with large weights
    tokenizer.json         and the tokenizer's other files
    config.json            of the model that it was made from
    reranker_config.json   a reranker's formats in words, for people; of an embedder modules.json and its other files
    reranker_onnx.json     the description read here; of an embedder embedder_onnx.json
    calibration.json       where a reranker had one; of an embedder int8_ranges.json

The graph of an embedder gives some of these, as the model has them; what is of padding means nothing:

    vectors             [texts, dim], which are cut and normalized as those of torch are
    sentence_embedding  the same for other programs, of length 1 where the model normalizes
    token_weights       [texts, length], lexical weights by a linear head; the largest of equal tokens is the text's
    lexical_weights     [texts, vocabulary], those of SPLADE
    token_vectors       [texts, length, width], of length 1

The fixed parts of a text are token ids here, not formats. To find them again would need
transformers, and a tokenizer of another version could cut them elsewhere. Nothing here imports torch.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter
from tokenizers import Tokenizer

from rag_retrieval.core.log import Progress
from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, PairTemplate, TokenId
from rag_retrieval.models.representation_files import SPLADE
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.settings import MODEL_TYPES, check_no_pointers, parsing, read_json
from rag_retrieval.models.text_encoding import TextTemplate
from rag_retrieval.models.token_batch import TokenBatch, make_batch, padded, plan_by_tokens

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1  # of the description; another number is another meaning
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PROMPT_TOKENS = "prompt_tokens"  # [texts]: tokens before each text itself, which its vector leaves out

SCORES, SENTENCE_EMBEDDING = "scores", "sentence_embedding"  # outputs

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], Sequence[np.ndarray]]  # padded inputs, each [texts, longest] int64, to outputs, float32


@dataclass(frozen=True, kw_only=True)
class OnnxDescription:
    """What is said of every exported model.

    inputs: of the graph, in order; those of INPUTS are [texts, longest], int64, padded at the right. precision: of the
    products. source: the model, versions and options it was made from. verification: what was measured after the
    export. The last two are for people, and nothing depends on them.
    """

    __pydantic_config__ = {"extra": "forbid"}
    file: ClassVar[str]  # where it lies

    pad_token_id: TokenId
    inputs: tuple[str, ...]
    precision: Literal["float32", "int8"]
    source: dict[str, Any]
    verification: dict[str, Any]
    format: Literal[FORMAT] = FORMAT

    @property
    def limit(self) -> int:
        """Tokens of a text at most: what the export verified."""
        raise NotImplementedError

    @property
    def expected_inputs(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def outputs(self) -> dict[str, str]:
        """Of the graph, those that are read: by what they are."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RerankerDescription(OnnxDescription):
    """`reranker_onnx.json`. max_length: tokens per pair."""

    __pydantic_config__ = {"extra": "forbid"}
    file = "reranker_onnx.json"

    model_type: Literal[MODEL_TYPES]
    max_length: Annotated[int, Field(strict=True, ge=1)]
    template: PairTemplate

    @property
    def limit(self) -> int:
        return self.max_length

    @property
    def expected_inputs(self) -> tuple[str, ...]:
        return INPUTS if self.template.types is not None else INPUTS[:2]

    @property
    def outputs(self) -> dict[str, str]:
        return {SCORES: SCORES}


@dataclass(frozen=True, kw_only=True)
class EmbedderDescription(OnnxDescription):
    """`embedder_onnx.json`. dim: numbers of a dense vector. special: ids of tokens without a weight by a linear head.
    skiplist: ids of tokens without a vector in documents of a ColBERT. vocabulary: numbers of `lexical_weights`, None
    without them."""

    __pydantic_config__ = {"extra": "forbid"}
    file = "embedder_onnx.json"

    settings: EmbedderSettings
    template: TextTemplate
    dim: Annotated[int, Field(strict=True, ge=1)]
    special: tuple[TokenId, ...] = ()
    skiplist: tuple[TokenId, ...] = ()
    vocabulary: Annotated[int, Field(strict=True, ge=1)] | None = None

    @property
    def limit(self) -> int:
        return max(self.settings.max_lengths.values())

    @property
    def expected_inputs(self) -> tuple[str, ...]:
        settings = self.settings
        pools_all = DENSE not in settings.representations or settings.include_prompt or settings.reads_one_token
        return INPUTS[:2] if pools_all else (*INPUTS[:2], PROMPT_TOKENS)

    @property
    def outputs(self) -> dict[str, str]:
        return output_names(self.settings)


def output_names(settings: EmbedderSettings) -> dict[str, str]:
    """Of an embedder's graph, by representation."""
    lexical = "lexical_weights" if settings.lexical == SPLADE else "token_weights"
    names = {DENSE: "vectors", LEXICAL: lexical, MULTI_VECTOR: "token_vectors"}
    return {representation: names[representation] for representation in settings.representations}


Description = TypeVar("Description", bound=OnnxDescription)


def holds(folder: Path, kind: type[OnnxDescription]) -> bool:
    """Whether it is an exported folder of this kind."""
    return (folder / kind.file).is_file()


def write_description(folder: Path, description: OnnxDescription) -> None:
    text = json.dumps(asdict(description), ensure_ascii=False, indent=2)
    (folder / description.file).write_text(text + "\n", encoding="utf-8")


def read_description(folder: Path, kind: type[Description]) -> Description:
    """Raises ValueError for a file that is damaged or of another format, and where the folder lacks a file."""
    path = folder / kind.file
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{folder}: no {kind.file} that can be read ({error.strerror}); give the folder that "
                         "rag-retrieval export wrote") from error  # fmt: skip
    with parsing(path, "export the model again"):
        description: Description = TypeAdapter(kind).validate_json(text)
        if description.inputs != description.expected_inputs:
            raise ValueError(f"inputs are {list(description.inputs)}; expected {list(description.expected_inputs)}")
    for name in (MODEL_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name} in it; copy the whole folder, or export the model again")
    check_no_pointers(str(folder))
    return description


def pair_encoder(folder: Path, description: RerankerDescription, max_length: int | None = None) -> PairEncoder:
    """max_length: tokens per pair, None for what the folder says. ValueError for more, which the export did not verify,
    for less than the fixed parts take, and for a damaged tokenizer.json."""
    check_length(folder, description, max_length)
    split = read_json(str(folder), "tokenizer_config.json").get("split_special_tokens") is True
    split = split or description.model_type == "llm_decoder"
    return PairEncoder(read_tokenizer(folder), description.template, max_length or description.max_length, split)


def check_length(folder: Path, description: OnnxDescription, length: int | None, name: str = "max_length") -> None:
    """Raises ValueError for more tokens than the export verified. name: of the option that says so."""
    if length is not None and length > description.limit:
        raise ValueError(
            f"{name} {length} is more than the {description.limit} tokens that {folder} was exported for; export a "
            "model with a larger max_length"
        )


def read_tokenizer(folder: Path) -> Tokenizer:
    """Raises ValueError for a damaged file, and for tokens that the model has no embedding for."""
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
    return tokenizer


class Forward(NamedTuple):
    """places: of its texts among all. outputs: those that were asked for, with the texts of the batch as first axis."""

    places: list[int]
    batch: TokenBatch
    outputs: Sequence[np.ndarray]


def forwards(
    run: Run,
    inputs_of: Callable[[TokenBatch], Inputs],
    texts: Sequence[EncodedPair],
    batch_size: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Iterator[Forward]:
    """Over all texts. Which of them share a forward changes no result beyond float noise. In int8 neither: a scale
    is a token's own or that of all texts.

    batch_size: texts of one forward at most. max_tokens: of one forward, padding included; a longer text is computed
    alone. Longest texts come first, so that running out of memory shows at once.
    """
    parts = plan_by_tokens([[len(text)] for text in texts], max_tokens, padded=True, max_pairs=batch_size)
    for part in parts if texts else ():
        batch = make_batch([texts[place] for place in part])
        yield Forward(part, batch, run(inputs_of(batch)))
        if progress is not None:
            progress.update(len(part))


def padded_inputs(
    batch: TokenBatch, names: Sequence[str], pad_token_id: int, unattended: np.ndarray | None = None
) -> Inputs:
    """names: of the inputs that the graph takes. unattended: as of `token_batch.padded`."""
    inputs = padded(batch, pad_token_id, unattended) | {PROMPT_TOKENS: batch.starts}
    return {name: inputs[name].astype(np.int64) for name in names}
