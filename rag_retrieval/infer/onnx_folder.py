"""What lies in an exported folder beside the graph, how texts are encoded from it and laid out for it.

    model.onnx             input_ids, attention_mask[, token_type_ids] to scores; model.onnx.data with large weights
    tokenizer.json         and the tokenizer's other files
    config.json            of the model that it was made from
    reranker_config.json   a reranker's formats in words, for people; of an embedder modules.json and its other files
    reranker_onnx.json     the description read here; of an embedder embedder_onnx.json
    calibration.json       where a reranker had one; of an embedder int8_ranges.json

The graph of an embedder gives `vectors`, which are cut and normalized as those of torch are, and for other programs
`sentence_embedding`, of length 1 where the model normalizes.

The fixed parts of a text are token ids here, not formats. To find them again would need
transformers, and a tokenizer of another version could cut them elsewhere. Nothing here imports torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter
from tokenizers import Tokenizer

from rag_retrieval.core.log import Progress
from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, PairTemplate, TokenId
from rag_retrieval.models.settings import MODEL_TYPES, check_no_pointers, parsing, read_json
from rag_retrieval.models.text_encoding import TextTemplate
from rag_retrieval.models.token_batch import make_batch, plan_by_tokens

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1  # of the description; another number is another meaning
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PROMPT_TOKENS = "prompt_tokens"  # [texts]: tokens before each text itself, which its vector leaves out

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], np.ndarray]  # padded inputs, each [texts, longest] int64, to one result for each text, float32


@dataclass(frozen=True, kw_only=True)
class OnnxDescription:
    """What is said of every exported model.

    inputs: of the graph, in order; those of INPUTS are [texts, longest], int64, padded at the right. precision: of the
    products. source: the model, versions and options it was made from. verification: what was measured after the
    export. The last two are for people, and nothing depends on them.
    """

    __pydantic_config__ = {"extra": "forbid"}
    file: ClassVar[str]  # where it lies
    output: ClassVar[str]  # of the graph, which is read

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


@dataclass(frozen=True, kw_only=True)
class RerankerDescription(OnnxDescription):
    """`reranker_onnx.json`. max_length: tokens per pair."""

    __pydantic_config__ = {"extra": "forbid"}
    file, output = "reranker_onnx.json", "scores"

    model_type: Literal[MODEL_TYPES]
    max_length: Annotated[int, Field(strict=True, ge=1)]
    template: PairTemplate

    @property
    def limit(self) -> int:
        return self.max_length

    @property
    def expected_inputs(self) -> tuple[str, ...]:
        return INPUTS if self.template.types is not None else INPUTS[:2]


@dataclass(frozen=True, kw_only=True)
class EmbedderDescription(OnnxDescription):
    """`embedder_onnx.json`. dim: numbers of a vector."""

    __pydantic_config__ = {"extra": "forbid"}
    file, output = "embedder_onnx.json", "vectors"

    settings: EmbedderSettings
    template: TextTemplate
    dim: Annotated[int, Field(strict=True, ge=1)]

    @property
    def limit(self) -> int:
        return max(self.settings.max_lengths.values())

    @property
    def expected_inputs(self) -> tuple[str, ...]:
        pools_all = self.settings.include_prompt or self.settings.reads_one_token
        return INPUTS[:2] if pools_all else (*INPUTS[:2], PROMPT_TOKENS)


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


def run_padded(
    run: Run,
    texts: Sequence[EncodedPair],
    names: Sequence[str],
    pad_token_id: int,
    batch_size: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Results in input order: [texts] or [texts, dim], float32. Which texts share a forward changes no result beyond
    float noise, in int8 neither, where every token has its own scale.

    names: of the inputs that the graph takes. batch_size: texts of one forward at most. max_tokens: of one forward,
    padding included; a longer text is computed alone. Longest texts come first, so that running
    out of memory shows at once.
    """
    results = np.empty(0, np.float32)
    parts = plan_by_tokens([[len(text)] for text in texts], max_tokens, padded=True, max_pairs=batch_size)
    for place, part in enumerate(parts if texts else ()):
        found = run(padded_inputs([texts[position] for position in part], names, pad_token_id))
        if place == 0:
            results = np.empty((len(texts), *found.shape[1:]), np.float32)
        results[part] = found
        if progress is not None:
            progress.update(len(part))
    return results


def padded_inputs(texts: Sequence[EncodedPair], names: Sequence[str], pad_token_id: int) -> Inputs:
    """Right-padded inputs of at least one text."""
    batch = make_batch(texts)
    real = np.arange(batch.lengths.max()) < batch.lengths[:, None]
    inputs = {name: np.zeros(real.shape, np.int64) for name in names}
    inputs["input_ids"][~real] = pad_token_id
    inputs["input_ids"][real] = batch.ids
    inputs["attention_mask"][real] = 1
    if "token_type_ids" in inputs:
        inputs["token_type_ids"][real] = batch.types
    if PROMPT_TOKENS in inputs:
        inputs[PROMPT_TOKENS] = batch.starts.astype(np.int64)
    return inputs
