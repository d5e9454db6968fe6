"""The keys of mining: types, ranges and meanings, and which values do not fit each other."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from rag_retrieval.core.config import (
    EngineOptions,
    FileOrFolder,
    FolderPath,
    ModelName,
    Only,
    OutputPath,
    key,
    shown_value,
)
from rag_retrieval.data.words import AUTO
from rag_retrieval.models.options import POOLINGS, LongDocumentOptions, ModelOptions, OpeningOptions
from rag_retrieval.models.representations import REPRESENTATIONS

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz")
FUSED, RANDOM = "fused", "random"  # candidates whose scores say nothing of relevance
CANDIDATES = ("bm25", *REPRESENTATIONS, FUSED, RANDOM)  # without an index
MARGINS = ("absolute_margin", "relative_margin", "max_score")

BEIR = Only("data in BEIR layout", lambda config: os.path.isdir(config.data))
RECORDS = Only("data that are a file of records", lambda config: not os.path.isdir(config.data))
WORDS = Only("candidates bm25 and fused without index", lambda config: config.index is None
             and config.candidates in ("bm25", FUSED))  # fmt: skip
MODEL = Only("candidates dense, lexical, multi_vector and fused without index", lambda config: config.index is None
             and config.candidates in (*REPRESENTATIONS, FUSED))  # fmt: skip
DENSE = Only("candidates dense and fused without index", lambda config: config.index is None
             and config.candidates in ("dense", FUSED))  # fmt: skip
RERANKER = Only("runs with a reranker", lambda config: config.reranker is not None)
JUDGE = Only("runs with a reranker or a guide", lambda config: (config.reranker or config.guide) is not None)
MODELS = Only(
    "runs with a model", lambda config: JUDGE.applies(config) or chosen_candidates(config) not in ("bm25", RANDOM)
)
SEEDED = Only(
    "sampling random, candidates random and faiss_index",
    lambda config: "random" in (config.sampling, config.candidates) or config.faiss_index is not None,
)
SEARCH_OF_FAISS = Only("FlagEmbedding: here device says where vectors are compared", lambda config: False)
RANGE = re.compile(r"(\d+)-(\d+)")


class MiningConfig(ModelOptions, LongDocumentOptions, EngineOptions):
    """The configuration of one run. A finished one has every value in it; None is "off" or "does not apply".

    The options for opening a model are those of the reranker or the guide; device and trust_remote_code are those of
    dense_model too. The aliases are the names of FlagEmbedding's hn_mine.py.
    """

    aliases: ClassVar = ModelOptions.aliases | {
        "input_file": "data", "output_file": "output", "candidate_pool": "corpus", "negative_number": "num_negatives",
        "embedder_name_or_path": "dense_model",
    }  # fmt: skip
    main_keys: ClassVar = ("data", "output", "candidates", "num_negatives", "reranker")
    groups: ClassVar = EngineOptions.groups | {
        "long_document": "Long documents", "model_type": "Opening the reranker", "data": "Data",
        "candidates": "Candidates", "num_negatives": "Negatives",
    }  # fmt: skip
    only_for: ClassVar = (
        dict.fromkeys([*ModelOptions.model_fields, "long_document"], RERANKER)
        | dict.fromkeys(OpeningOptions.model_fields, JUDGE)
        | dict.fromkeys(("device", "trust_remote_code"), MODELS)
    )

    data: FileOrFolder = Field(
        min_length=1, description="A folder in BEIR layout, or a file of ranking records (its positives are used)."
    )
    split: str | None = key(
        "The queries of qrels/SPLIT.tsv. Default train.", only=BEIR, derive=lambda config: "train", min_length=1
    )
    corpus: FileOrFolder | None = key(
        "The documents, JSON lines with text and, if they have one, title (.jsonl, .jsonl.gz). Absent, and without "
        "index: those of the records.", only=RECORDS, min_length=1,
    )  # fmt: skip
    index: FolderPath | None = key(
        "An index that `rag-retrieval index` wrote: its documents are mined, in place of corpus, by its searches.",
        min_length=1,
    )
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

    candidates: str | None = key(
        "Where they come from: bm25 (words), dense (vectors), lexical (weights of tokens), multi_vector (token "
        "vectors), fused (all searches of the index, else bm25 and dense, by reciprocal rank fusion), random (any "
        "document). Default fused with an index, dense with dense_model, else bm25.",
        derive=lambda config: chosen_candidates(config), min_length=1,
    )  # fmt: skip
    language: str | None = key(
        "Of the words: auto (by the script of each word; Latin is English), plain (words as they are), or a Snowball "
        "stemmer such as german.",
        only=WORDS,
        derive=lambda config: AUTO,
        min_length=1,
    )
    dense_model: ModelName | None = key(
        "A sentence-transformers folder, a plain encoder's, a hub name, or package:NAME.", only=MODEL, min_length=1
    )
    pooling: Literal[POOLINGS] | None = key(
        "How token states become a vector. Absent: what the folder says, or a known model's own, else the mean.",
        only=DENSE,
    )
    query_prefix: str | None = key(
        "Text before each query that is encoded, as E5's `query: `. Absent: the model's own prompt.", only=MODEL
    )
    document_prefix: str | None = key(
        "Text before each document that is encoded. Absent: the model's own prompt.", only=MODEL
    )
    dense_max_len: int | None = key(
        "Tokens of a text that are encoded. Absent: the model's own maximum.", only=MODEL, ge=2
    )
    dense_batch_size: int | None = key("Texts encoded at once. Default 32.", only=MODEL, derive=lambda config: 32, ge=1)
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
    range_for_sampling: str | None = key(
        "first_rank and last_rank as FlagEmbedding writes them: 2-200 leaves the first 2 out and ends with rank 200."
    )
    first_rank: int = key(
        "First rank of the window that negatives come from, counted from 1.", 1,
        derive=lambda config: config.sampled_ranks[0] if config.range_for_sampling else 1, ge=1,
    )  # fmt: skip
    last_rank: int = key(
        "Last rank of that window; also how many candidates are fetched.", 100,
        derive=lambda config: config.sampled_ranks[1] if config.range_for_sampling else 100, ge=1,
    )  # fmt: skip
    sampling: Literal["random", "top"] = key(
        "Draw among the candidates that fit, by the seed, or take the best ranked.", "random"
    )
    absolute_margin: float | None = key(
        "A negative scores at least this much less than the query's lowest positive. With a reranker or a guide and "
        "none of absolute_margin, relative_margin, max_score: 0.",
        derive=lambda config: 0.0
        if JUDGE.applies(config) and config.relative_margin is config.max_score is None else None,
        ge=0,
    )  # fmt: skip
    relative_margin: float | None = key(
        "The same as a fraction of the positive's score: 0.05 keeps what has up to 95%.", ge=0, lt=1
    )
    max_score: float | None = key("Highest score that a negative may have.")
    reranker: ModelName | None = key(
        "A trained reranker, folder, hub name or package:NAME: its scores replace the candidates' for the margins and "
        "max_score, and in the output.",
        min_length=1,
    )
    guide: ModelName | None = key(
        "An embedding model, folder, hub name or package:NAME, whose similarities do the same, for less computation.",
        min_length=1,
    )
    seed: int = key("Seed of the draw, and of a FAISS index.", 42, only=SEEDED, ge=0)
    use_gpu_for_searching: bool | None = key("Accepted, so that commands run unchanged.", only=SEARCH_OF_FAISS)

    @field_validator("output")
    @classmethod
    def _is_json_lines(cls, name: str) -> str:
        if not name.endswith(OUTPUT_SUFFIXES):
            raise ValueError(f"expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}, found {name}")
        return name

    @field_validator("range_for_sampling")
    @classmethod
    def _is_range(cls, text: str) -> str:
        if not RANGE.fullmatch(text):
            raise ValueError(f"expected two numbers such as 2-200, found {text}")
        return text

    @property
    def sampled_ranks(self) -> tuple[int, int]:
        """Of `range_for_sampling`, which counts from 0 and leaves its end out."""
        first, end = RANGE.fullmatch(self.range_for_sampling).groups()
        return int(first) + 1, int(end)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.index is not None and self.corpus is not None:
            yield "corpus", "is given, and so is index, which has its own documents; give one of them"
        if self.index is None and self.candidates not in CANDIDATES:
            yield "candidates", f"expected one of {', '.join(CANDIDATES)}, found {shown_value(self.candidates)}"
        if MODEL.applies(self) and self.dense_model is None:
            yield "dense_model", f"is missing; candidates {self.candidates} needs a model for the vectors"
        if self.reranker is not None and self.guide is not None:
            yield "guide", "is given, and so is reranker; the scores of one of them decide"
        if self.range_for_sampling is not None and self.model_fields_set & {"first_rank", "last_rank"}:
            yield "range_for_sampling", "is given, and so are first_rank or last_rank, which say the same; keep one"
        first, last, wanted = self.first_rank, self.last_rank, self.num_negatives
        if last < first:
            yield "last_rank", f"expected at least first_rank, {first}, found {last}"
        elif last - first + 1 < wanted:
            found = f"ranks {first} to {last} hold {last - first + 1} candidates"
            yield "num_negatives", f"{found}, which cannot give {wanted} negatives; widen the window or ask for fewer"
        if self.candidates == RANDOM and self.labels == "score" and not JUDGE.applies(self):
            yield "labels", "teaches scores, and random candidates have none; add a reranker or a guide"
        if self.candidates in (FUSED, RANDOM) and not JUDGE.applies(self):
            for name in MARGINS:
                if getattr(self, name) is not None:
                    found = f"compares scores, and those of {self.candidates} candidates say nothing of relevance"
                    yield name, f"{found}; add a reranker or a guide, or remove this"


def chosen_candidates(config: MiningConfig) -> str:
    return config.candidates or (FUSED if config.index else "dense" if config.dense_model else "bm25")


def summary_file(output: str) -> Path:
    """`train.jsonl.gz` to `train.summary.json`, in the same folder."""
    return Path(output.removesuffix(".gz").removesuffix(".jsonl") + ".summary.json")
