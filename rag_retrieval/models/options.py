"""The options for opening a model and for reading long documents: the same names and values wherever they are given.

The configuration of a command that opens a model inherits from `ModelOptions` and passes `model_options()` on, to
`open_backend` or `open_scorer`. Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from rag_retrieval.core.config import NAMES, Config, EscapedText, Only, key
from rag_retrieval.core.config_reader import error_message

LONG_DOCUMENT = ("truncate", "max_slice", "mean_slice", "first_slice")
LONG_DOCUMENT_DEFAULT = "truncate"  # measured: see `Reranker.rerank`
OVERLAP = 64  # tokens
POOLINGS = ("cls", "mean", "weighted_mean", "last", "latent_attention")  # see `models.pooling`
NUMBER_FORMATS = {
    "float32": "fp32", "no": "fp32", "False": "fp32", "bfloat16": "bf16", "float16": "fp16"
}  # fmt: skip

SLICED = Only(
    "long_document max_slice and mean_slice", lambda config: config.long_document in ("max_slice", "mean_slice")
)


def number_format(value: Any) -> Any:
    """fp32, bf16 or fp16 for its other spellings (torch.bfloat16, "no", and YAML's reading of a bare no)."""
    return NUMBER_FORMATS.get(str(value).removeprefix("torch."), value)


def from_json(value: Any) -> Any:
    """What a text of the command line stands for; other values, and what is no JSON, as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


Options = TypeVar("Options", bound="OpeningOptions")
NumberFormat = Annotated[Literal["fp32", "bf16", "fp16"] | None, BeforeValidator(number_format)]
DeviceName = Annotated[str | None, BeforeValidator(lambda value: value if value is None else str(value))]


class OpeningOptions(Config):
    """How to open a model of any kind. None: what the folder says, or the machine's own choice."""

    aliases: ClassVar[Mapping[str, str]] = {"max_len": "max_length"}
    groups: ClassVar[Mapping[str, str]] = {"device": "Opening the model"}

    device: DeviceName = Field(
        None, min_length=1, description="Such as cpu, cuda:0, mps or npu:0. Absent: a GPU if there is one."
    )
    devices: Annotated[list[str] | None, NAMES] = Field(
        None, min_length=1, description="Several devices, such as cuda:0,cuda:1; each holds a copy of the model."
    )
    dtype: NumberFormat = Field(None, description="Number format of the weights. Absent: fp32.")
    precision: NumberFormat = Field(
        None,
        description="Number format of the computation with fp32 weights. Absent: half precision on a GPU, fp32 on a "
        "CPU.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    max_length: int | None = Field(
        None,
        ge=1,
        description="Longest pair, or text of an embedder, in tokens, special tokens included. Absent: what the "
        "model's folder says, else 512.",
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="Attention of transformers, such as sdpa or eager. Absent: batches without padding, where the "
        "model allows it.",
    )

    def only(self, kind: type[Options], device: Any = None) -> Options:
        """The options of this kind alone, of a configuration that has other keys too. device: where they name none."""
        values = {name: getattr(self, name) for name in kind.model_fields}
        if values["device"] is None and values["devices"] is None:
            values["device"] = device
        return kind(**values)

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named options that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class EmbedderOptions(OpeningOptions):
    """How to open an embedding model."""

    model_type: Literal["onnx", "openvino"] | None = Field(
        None, description="Of an exported folder; openvino runs it with that runtime in place of ONNX Runtime."
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="Longest text, in tokens, special tokens included. Absent: what the model's folder says, else 512.",
    )
    query_max_length: int | None = Field(None, ge=1, description="The same of a query. Absent: as for other texts.")
    pooling: Literal[POOLINGS] | None = Field(
        None, description="How token states become a vector. Absent: what the folder says, or a known model's own."
    )
    prompts: Annotated[dict[str, str] | None, BeforeValidator(from_json)] = Field(
        None,
        description='Text before a text, by name: query and document, as {"query": "query: "}. In place of the '
        "folder's of that name.",
    )
    include_prompt: bool | None = Field(None, description="Whether the tokens of a prompt are pooled too.")
    cls_interval: int | None = Field(
        None, ge=2, description="Pooling cls: another cls after every so many tokens of a text, and their mean."
    )
    normalize: bool | None = Field(None, description="Whether vectors are made to length 1.")
    bidirectional: bool | None = Field(
        None, description="Decoders: whether tokens see those after them, as in an encoder."
    )


class ModelOptions(OpeningOptions):
    """How to open a reranker."""

    model_type: Literal["bert_encoder", "llm_decoder", "onnx", "openvino"] | None = Field(
        None,
        description="Architecture, where the folder's files do not decide it; openvino runs an exported folder with "
        "that runtime in place of ONNX Runtime.",
    )
    query_format: EscapedText | None = Field(None, description="Text around a query, which stands for {}.")
    document_format: EscapedText | None = Field(None, description="Text around a document, which stands for {}.")
    split_special_tokens: bool | None = Field(
        None,
        description="Encoders: read special tokens inside texts, such as [SEP], as plain text; decoders always do. "
        "Absent: what the model's folder says, else false.",
    )
    seq: EscapedText | None = Field(None, description="Decoders: text between query and document.")
    special_token: EscapedText | None = Field(
        None, description="Decoders: text after the document; the score is read at its last token."
    )
    cutoff_layer: int | None = Field(
        None, ge=1, description="Decoders trained with a head at several layers: score at this one, and skip the rest."
    )
    head: Literal["scalar", "yes_no"] | None = Field(
        None, description="Decoders: a trained score head, or the logit of yes minus that of no."
    )
    instruction: EscapedText | None = Field(None, description="yes_no: stands for {instruction} in the formats.")
    yes_token: str | None = Field(None, min_length=1, description="yes_no: the answer for a relevant document.")
    no_token: EscapedText | None = Field(None, description='yes_no: the other answer; "" reads yes alone.')

    def model_options(self, device: Any = None) -> "ModelOptions":
        """See `only`."""
        return self.only(ModelOptions, device)

    def embedder_options(self) -> EmbedderOptions:
        """Those that are for embedders too, for what opens one in a reranker's place or beside it."""
        model_type = self.model_type if self.model_type in ("onnx", "openvino") else None
        opening = {name: getattr(self, name) for name in OpeningOptions.model_fields}
        return EmbedderOptions(**opening, model_type=model_type)


class LongDocumentOptions(Config):
    """How documents are read that do not fit beside their query: `rerank` describes the values."""

    long_document: Literal[LONG_DOCUMENT] = Field(
        LONG_DOCUMENT_DEFAULT,
        description="How a document that does not fit beside the query is read: truncate, its beginning; max_slice, in "
        "slices, and the best one's score counts; mean_slice, their mean; first_slice, the first alone.",
    )
    overlap: int = key(
        "Tokens that neighbouring slices of a long document share, at most half a slice.", OVERLAP, only=SLICED, ge=0
    )


def model_options(**values: Any) -> ModelOptions:
    """For Python callers: raises ValueError in one line that names the option."""
    return _checked(ModelOptions, values)


def _checked(kind: type[Options], values: Mapping[str, Any]) -> Options:
    try:
        return kind(**values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        name = wrong["loc"][0]
        raise ValueError(f"{name}: {error_message(name, wrong, kind, nested=False)}") from error


def options_among(arguments: Mapping[str, Any], kind: type[Options] = ModelOptions) -> Options:
    """Of the arguments of a call, as `locals()` gives them at its beginning, those that are options."""
    return _checked(kind, {name: value for name, value in arguments.items() if name in kind.model_fields})
