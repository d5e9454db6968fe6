"""The keys of `rag-retrieval mteb`; those of PaddleNLP's command are among them. Nothing here imports mteb."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rag_retrieval.core.config import NAMES, EscapedText, ModelName, Only, OutputPath, key
from rag_retrieval.models.options import EmbedderOptions, OpeningOptions

EMBEDDER = Only("runs with a model", lambda config: config.model is not None)
RERANKED = Only(
    "runs that search and rerank", lambda config: config.reranker is not None and config.candidates is not None
)
TOKENIZER = Only("PaddleNLP: here the model's folder says which tokens stand around a text", lambda config: False)


class MtebConfig(EmbedderOptions):
    """One evaluation on tasks of MTEB."""

    aliases: ClassVar = EmbedderOptions.aliases | {
        "base_model_name_or_path": "model", "task_name": "tasks", "task_split": "split", "max_seq_length": "max_length",
        "pooling_method": "pooling", "eval_batch_size": "batch_size",
    }  # fmt: skip
    main_keys: ClassVar = ("model", "tasks", "split", "reranker", "output_folder")
    groups: ClassVar = EmbedderOptions.groups | {"model": "Evaluation", "pad_token": "Without effect"}
    only_for: ClassVar = dict.fromkeys(
        EmbedderOptions.model_fields.keys() - OpeningOptions.model_fields.keys(), EMBEDDER
    )

    model: ModelName | None = key("Folder, hub name, or package:NAME of an embedding model.", min_length=1)
    reranker: ModelName | None = key(
        "The same of a reranker. Alone it orders the documents that a reranking task lists; with a model or candidates "
        "what they find in the corpus.", min_length=1
    )  # fmt: skip
    candidates: Literal["bm25", "dense", "lexical", "multi_vector", "fused"] | None = key(
        "How the corpus of a retrieval task is searched, in an index of ours: by words, by dense vectors, lexical "
        "weights or token vectors of the model, or by words and dense vectors (fused). Default dense with a model and "
        "a reranker; absent with one of them, which then is MTEB's to call.",
        derive=lambda config: "dense" if config.model and config.reranker else None,
    )
    depth: int = key("Documents of a query that are reranked.", 100, only=RERANKED, ge=1)
    tasks: Annotated[tuple[str, ...], NAMES] = Field(
        min_length=1,
        description="Names of MTEB's tasks, folders in BEIR layout, or own task classes as module:Class, between "
        "commas.",
    )
    split: str | None = key("Of the tasks. Absent: what each names itself; test of a folder.", min_length=1)
    query_instruction: EscapedText | None = key(
        'Text before each query, "" for none. Absent: the model\'s prompt for the task, or for queries.', only=EMBEDDER
    )
    document_instruction: EscapedText | None = key("The same before each document.", only=EMBEDDER)
    batch_size: int = key("Texts or pairs of one forward, at most.", 256, ge=1)
    output_folder: OutputPath = key(
        "Where MTEB's result files go, results/MODEL/REVISION/TASK.json.", "runs/mteb", min_length=1
    )
    prediction_folder: OutputPath | None = key("Where the rankings go, in MTEB's files too.", min_length=1)

    pad_token: str | None = key("Accepted, so that commands run unchanged.", only=TOKENIZER)
    padding_side: str | None = key("The same.", only=TOKENIZER)
    add_bos_token: bool | None = key("The same.", only=TOKENIZER)
    add_eos_token: bool | None = key("The same.", only=TOKENIZER)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.model is None and (self.candidates not in (None, "bm25") or self.reranker is self.candidates is None):
            yield "model", "is missing; give an embedding model, a reranker, or candidates bm25"
