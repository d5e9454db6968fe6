"""The keys of `rag-retrieval evaluate --retriever`: what is searched, by what, and what is measured.

The options for opening a model are the embedder's; a reranker is opened as its folder says, on the same device. To
measure a reranker with other options, give a run that is written here to `evaluate --model RERANKER --candidates`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ModelWrapValidatorHandler, model_validator

from rag_retrieval.core.config import NAMES, Location, ModelName, Only, OutputPath, failure, key
from rag_retrieval.data.words import AUTO
from rag_retrieval.evaluate.config import DEFAULT_MEASURES, EvaluationKeys
from rag_retrieval.evaluate.other_commands import ALIASES, DICT_MEASURES, translate
from rag_retrieval.metrics import parse_metric
from rag_retrieval.models.options import EmbedderOptions, LongDocumentOptions
from rag_retrieval.models.representations import DENSE, MULTI_VECTOR, Representation
from rag_retrieval.retrieval.bm25 import BM25
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index_files import INDEX_FILE


def is_index(retriever: str) -> bool:
    return (Path(retriever) / INDEX_FILE).is_file()


def is_model(retriever: str) -> bool:
    """Whether documents are encoded by it: it is neither words, nor an index, nor a run file."""
    return retriever != BM25 and not is_index(retriever) and not os.path.isfile(retriever)


RETRIEVAL = Only("data in BEIR layout", lambda config: os.path.isdir(config.data))
WORDS = Only("retriever bm25", lambda config: BM25 in config.retriever)
MODELS = Only("retrievers that are models", lambda config: any(map(is_model, config.retriever)))
SEARCHES = Only(
    "data in BEIR layout and retrievers that are models",
    lambda config: RETRIEVAL.applies(config) and MODELS.applies(config),
)
ONE_MODEL = Only(
    "data in BEIR layout and a single retriever, a model",
    lambda config: RETRIEVAL.applies(config) and [is_model(each) for each in config.retriever] == [True],
)
RERANKER = Only("runs with a reranker", lambda config: config.reranker is not None)
SHARED = {"device", "devices", "dtype", "precision", "trust_remote_code"}  # with the reranker
Retriever = Annotated[str, Location(file=True, folder=True, hub=True, package=True, words=(BM25,))]


class RetrievalEvaluationConfig(EmbedderOptions, LongDocumentOptions, EvaluationKeys):
    """One evaluation of retrievers over a whole corpus."""

    aliases: ClassVar = EmbedderOptions.aliases | ALIASES
    main_keys: ClassVar = ("retriever", "data", "split", "reranker", "depth", "output_dir")
    groups: ClassVar = EvaluationKeys.groups | {
        "long_document": "Long documents", "device": "Opening the embedder", "retriever": "Retrievers",
        "reranker": "Reranker", "output_format": "Output", "batch_size": "Scoring",
    }  # fmt: skip

    retriever: Annotated[tuple[Retriever, ...], NAMES] = key(
        "bm25, an embedder (folder, hub name, package:NAME), an index (rag-retrieval index) or a TREC run file, or "
        "several between commas; needed without checkpoints.",
        (),
        derive=lambda config: (config.checkpoints,) if config.checkpoints else (),
    )
    query_model: ModelName | None = key(
        "Embedder of the queries, where that of the documents is another one.", only=ONE_MODEL, min_length=1
    )
    language: str = key(
        "Of BM25's words: auto (by the script of each word; Latin is English), plain (as they are), or a Snowball "
        "stemmer such as german.", AUTO, only=WORDS, min_length=1
    )  # fmt: skip
    representations: Annotated[tuple[Representation, ...] | None, NAMES] = key(
        "What of a model is searched: dense, lexical or multi_vector (all documents by their token vectors), several "
        "between commas, which are then fused. Default dense.",
        only=SEARCHES, derive=lambda config: (DENSE,), min_length=1,
    )  # fmt: skip
    faiss_index: str | None = key(
        "An index of FAISS by its factory name, such as IVF1024,Flat. Absent: exact search over all documents.",
        only=SEARCHES, min_length=1,
    )  # fmt: skip
    corpus_embeddings: OutputPath | None = key(
        "Folder of the documents' vectors as corpus_embeddings_rank0.npy and so on, in the order of the corpus; read "
        "where they are there, else written, a file by each process.",
        only=ONE_MODEL, min_length=1,
    )  # fmt: skip
    reranker: ModelName | None = key(
        "Folder, hub name, or package:NAME of a reranker of each retriever's last stage.", min_length=1
    )
    baseline: str | None = key("Row of the table that others are compared with. Absent: the first.", min_length=1)
    output_format: Literal["table", "dict"] = key(
        "How figures are printed: a table with comparisons, or a dict such as {'MRR@10': 0.4}.", "table"
    )
    output_dir: OutputPath | None = key(
        "Where indexes, runs, per_query.jsonl and result.json go; the same command continues from there. Absent: "
        "runs/evaluate/RETRIEVERS-DATA.",
        min_length=1,
    )
    batch_size: int = key("Texts or pairs of one forward, at most.", 256, ge=1)

    only_for: ClassVar = (
        dict.fromkeys(EmbedderOptions.model_fields.keys() - SHARED, MODELS)
        | dict.fromkeys(EvaluationKeys.model_fields.keys() - {"data", "checkpoints"}, RETRIEVAL)
        | dict.fromkeys(("reranker", "baseline"), RETRIEVAL)
        | dict.fromkeys(LongDocumentOptions.model_fields.keys() - {"overlap"}, RERANKER)
    )

    @model_validator(mode="wrap")
    @classmethod
    def _translate(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        values, problems = translate(given)
        if problems:
            raise failure(cls, problems, given)
        if values.get("output_format") == "dict":
            values.setdefault("measures", DICT_MEASURES)
        return handler(values)

    def index_options(self, retriever: str) -> IndexOptions:
        """Of the index that an evaluation makes of this retriever."""
        if retriever == BM25:
            return IndexOptions(bm25=True, language=self.language)
        options = self.given(*EmbedderOptions.model_fields, "representations", "faiss_index", "batch_size")
        if DENSE in (self.representations or ()):
            options["vector_precision"] = "float32"
        if MULTI_VECTOR in (self.representations or ()):
            options |= {"token_precision": "float32", "token_candidates": "all"}
        return IndexOptions(bm25=False, embedder=retriever, **options)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.retriever or not all(self.retriever):
            yield "retriever", "a name is missing; expected bm25, a model, an index or a run file, or checkpoints"
        if len(set(self.retriever)) < len(self.retriever):
            yield "retriever", "the same twice; give each once"
        if os.path.isfile(self.data) and not MODELS.applies(self):
            yield "retriever", "cannot compare the two texts of a pair; expected an embedder, or data in BEIR layout"
        if self.representations not in (None, (DENSE,)):
            for name in ("query_model", "corpus_embeddings", "faiss_index"):
                if getattr(self, name) is not None:
                    yield name, f"is for dense vectors, and representations are {', '.join(self.representations)}"
        if self.corpus_embeddings and self.faiss_index not in (None, "Flat"):
            yield "faiss_index", f"is {self.faiss_index}, and corpus_embeddings are searched exactly; leave it out"
        deepest = max((parse_metric(name)[1] or 0 for name in self.measures), default=0)
        if self.measures not in (DEFAULT_MEASURES, DICT_MEASURES) and deepest > self.depth:
            yield "depth", f"is {self.depth}, and measures read the first {deepest} documents; raise it"
