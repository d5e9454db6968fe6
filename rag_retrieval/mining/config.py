"""The keys of mining: types, ranges and meanings, and which values do not fit each other."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from rag_retrieval.core.config import FileOrFolder, ModelName, Only, OutputPath, key
from rag_retrieval.data.words import AUTO
from rag_retrieval.models.options import POOLINGS, LongDocumentOptions, ModelOptions

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz")
MARGINS = ("absolute_margin", "relative_margin", "max_score")

BEIR = Only("data in BEIR layout", lambda config: os.path.isdir(config.data))
RECORDS = Only("data that are a file of records", lambda config: not os.path.isdir(config.data))
WORDS = Only("candidates bm25 and fused", lambda config: config.candidates != "dense")
RERANKER = Only("runs with a reranker", lambda config: config.reranker is not None)
MODELS = Only("runs with a model", lambda config: config.reranker is not None or config.candidates != "bm25")
SEEDED = Only(
    "sampling random and faiss_index", lambda config: config.sampling == "random" or config.faiss_index is not None
)
DENSE = Only("candidates dense and fused", lambda config: config.candidates != "bm25")


class MiningConfig(ModelOptions, LongDocumentOptions):
    """The configuration of one run. A finished one has every value in it; None is "off" or "does not apply".

    The options for opening a model are the reranker's; device and trust_remote_code are those of dense_model too.
    """

    main_keys: ClassVar = ("data", "output", "candidates", "num_negatives", "reranker")
    groups: ClassVar = {
        "long_document": "Long documents", "model_type": "Opening the reranker", "data": "Data",
        "candidates": "Candidates", "num_negatives": "Negatives",
    }  # fmt: skip
    only_for: ClassVar = (
        dict.fromkeys([*ModelOptions.model_fields, "long_document"], RERANKER)
        | dict.fromkeys(("device", "trust_remote_code"), MODELS)
    )

    data: FileOrFolder = Field(
        min_length=1, description="A folder in BEIR layout, or a file of ranking records (its positives are used)."
    )
    split: str | None = key(
        "The queries of qrels/SPLIT.tsv. Default train.", only=BEIR, derive=lambda config: "train", min_length=1
    )
    corpus: FileOrFolder | None = key(
        "The documents, JSON lines with text and, if they have one, title (.jsonl, .jsonl.gz).",
        only=RECORDS, min_length=1,
    )  # fmt: skip
    output: OutputPath = Field(
        min_length=1, description="The file to write, .jsonl or .jsonl.gz, from the current folder."
    )
    output_format: Literal["pos_neg", "hits", "pointwise"] = key(
        "The trainer's formats: two lists, labelled documents, or one line for each pair.", "pos_neg"
    )
    labels: Literal["relevance", "score"] = key(
        "What the records teach: relevance (that of the data, 0 for negatives), or the score that decided (the "
        "reranker's, else the candidates'), as a teacher's.",
        "relevance",
    )
    overwrite: bool = key("Replace output where it exists. Otherwise that is refused.", False)
    work_dir: OutputPath | None = key(
        "Folder for index, vectors and finished parts, kept for further runs. Absent: OUTPUT.work, removed when output "
        "is written.",
        min_length=1,
    )

    candidates: Literal["bm25", "dense", "fused"] = key(
        "Where they come from: words, vectors, or both by reciprocal rank fusion.", "bm25"
    )
    language: str | None = key(
        "Of the words: auto (by the script of each word; Latin is English), plain (words as they are), or a Snowball "
        "stemmer such as german.", only=WORDS, derive=lambda config: AUTO, min_length=1
    )
    dense_model: ModelName | None = key(
        "A sentence-transformers folder, a plain encoder's, a hub name, or package:NAME.", only=DENSE, min_length=1
    )
    pooling: Literal[POOLINGS] | None = key(
        "How token states become a vector. Absent: what the folder says, or a known model's own, else the mean.",
        only=DENSE,
    )
    query_prefix: str | None = key(
        "Text before each query that is encoded, as E5's `query: `. Absent: the model's own prompt.", only=DENSE
    )
    document_prefix: str | None = key(
        "Text before each document that is encoded. Absent: the model's own prompt.", only=DENSE
    )
    dense_max_len: int | None = key(
        "Tokens of a text that are encoded. Absent: the model's own maximum.", only=DENSE, ge=2
    )
    dense_batch_size: int | None = key("Texts encoded at once. Default 32.", only=DENSE, derive=lambda config: 32, ge=1)
    similarity: Literal["cosine", "dot"] | None = key(
        "How vectors are compared: by angle, or by inner product. Default cosine.",
        only=DENSE, derive=lambda config: "cosine",
    )  # fmt: skip
    vector_dtype: Literal["float16", "float32"] | None = key(
        "How vectors are kept on disk. Default float16.", only=DENSE, derive=lambda config: "float16"
    )
    faiss_index: str | None = key(
        "An index of FAISS by its factory name, such as IVF1024,Flat. Absent: exact search over all documents.",
        only=DENSE, min_length=1,
    )  # fmt: skip

    num_negatives: int = key("Negatives per query, at most.", 7, ge=1)
    first_rank: int = key("First rank of the window that negatives come from, counted from 1.", 1, ge=1)
    last_rank: int = key("Last rank of that window; also how many candidates are fetched.", 100, ge=1)
    sampling: Literal["random", "top"] = key(
        "Draw among the candidates that fit, by the seed, or take the best ranked.", "random"
    )
    absolute_margin: float | None = key(
        "A negative scores at least this much less than the query's lowest positive. With a reranker and none of "
        "absolute_margin, relative_margin, max_score: 0.",
        derive=lambda config: 0.0 if config.reranker and config.relative_margin is config.max_score is None else None,
        ge=0,
    )
    relative_margin: float | None = key(
        "The same as a fraction of the positive's score: 0.05 keeps what has up to 95%.", ge=0, lt=1
    )
    max_score: float | None = key("Highest score that a negative may have.")
    reranker: ModelName | None = key(
        "A trained reranker, folder, hub name or package:NAME: its scores replace the candidates' for the margins and "
        "max_score, and in the output.",
        min_length=1,
    )
    seed: int = key("Seed of the draw, and of a FAISS index.", 42, only=SEEDED, ge=0)

    @field_validator("output")
    @classmethod
    def _is_json_lines(cls, name: str) -> str:
        if not name.endswith(OUTPUT_SUFFIXES):
            raise ValueError(f"expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}, found {name}")
        return name

    def problems(self) -> Iterator[tuple[str, str]]:
        if os.path.isfile(self.data) and self.corpus is None:
            yield "corpus", "is missing; a file of records needs the documents to mine from: add corpus"
        if self.candidates != "bm25" and self.dense_model is None:
            yield "dense_model", f"is missing; candidates {self.candidates} needs a model for the vectors"
        first, last, wanted = self.first_rank, self.last_rank, self.num_negatives
        if last < first:
            yield "last_rank", f"expected at least first_rank, {first}, found {last}"
        elif last - first + 1 < wanted:
            found = f"ranks {first} to {last} hold {last - first + 1} candidates"
            yield "num_negatives", f"{found}, which cannot give {wanted} negatives; widen the window or ask for fewer"
        if self.candidates == "fused" and self.reranker is None:
            for name in MARGINS:
                if getattr(self, name) is not None:
                    yield name, "compares scores, and fused candidates have ranks alone; add a reranker or remove this"


def summary_file(output: str) -> Path:
    """`train.jsonl.gz` to `train.summary.json`, in the same folder."""
    return Path(output.removesuffix(".gz").removesuffix(".jsonl") + ".summary.json")
