"""The keys of an index: what is built from a corpus, and the command that builds, changes and exports it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rag_retrieval.core.config import NAMES, EngineOptions, FileOrFolder, ModelName, Only, OutputPath, key
from rag_retrieval.data.documents import PASSAGE_TOKENS, row_file
from rag_retrieval.data.readers import text_lines
from rag_retrieval.data.words import AUTO
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, Representation
from rag_retrieval.models.vectors import VectorPrecision

DEPTH = 100  # documents that each stage of a search finds, where nobody says another number
RESIDUAL_BITS = {"residual4": 4, "residual2": 2, "residual1": 1}  # by the name of the precision
TokenPrecision = Literal["float32", "float16", "int8", "residual4", "residual2", "residual1"]
TokenCandidates = Literal["dense", "lexical", "tokens", "all"]

MODEL = Only("indexes with an embedder", lambda config: config.embedder is not None)
VECTORS = Only("indexes of dense vectors", lambda config: DENSE in (config.representations or ()))
TOKENS = Only("indexes of token vectors", lambda config: MULTI_VECTOR in (config.representations or ()))
WORDS = Only("indexes with bm25", lambda config: config.bm25)
FAISS = Only("indexes with faiss_index", lambda config: config.faiss_index is not None)
APPROXIMATE = Only(
    "indexes with rescore_precision, faiss_index or token_candidates other than all",
    lambda config: config.faiss_index is not None
    or config.rescore_precision is not None
    or config.token_candidates not in (None, "all"),
)


def default_candidates(config: "IndexOptions") -> str:
    return next((kind for kind in (DENSE, LEXICAL) if kind in config.representations), "tokens")


class IndexOptions(EmbedderOptions):
    """What an index holds. Those for opening a model are the embedder's."""

    groups: ClassVar = {
        "device": "Opening the embedder", "embedder": "What is indexed", "vector_precision": "Vectors",
        "token_precision": "Token vectors", "batch_size": "Work",
    }  # fmt: skip
    only_for: ClassVar = dict.fromkeys(EmbedderOptions.model_fields, MODEL)

    embedder: ModelName | None = key(
        "An embedding model: folder, hub name, or package:NAME. Absent: no vectors.", min_length=1
    )
    representations: Annotated[tuple[Representation, ...] | None, NAMES] = key(
        "What of the model is indexed: dense (a vector of each document), lexical (weights of its tokens) or "
        "multi_vector (a vector of each token), several between commas. Default dense.",
        only=MODEL, derive=lambda config: (DENSE,), min_length=1,
    )  # fmt: skip
    bm25: bool = key("Index the words of the documents.", True)
    language: str | None = key(
        "Of the words: auto (by the script of each word; Latin is English), plain (words as they are), or a Snowball "
        "stemmer such as german.", only=WORDS, derive=lambda config: AUTO, min_length=1
    )
    passage_tokens: int = key(
        "Tokens of a passage of a text file, at most: words, marks, and each character of scripts without spaces.",
        PASSAGE_TOKENS, ge=8,
    )  # fmt: skip

    vector_precision: VectorPrecision | None = key(
        "How the vectors are kept. Default float16.", only=VECTORS, derive=lambda config: "float16"
    )
    rescore_precision: Literal["float32", "float16", "int8"] | None = key(
        "Of a finer copy on the disk that scores the best of the search anew. Absent: there is none.", only=VECTORS
    )
    faiss_index: str | None = key(
        "An index of FAISS by its factory name, such as IVF1024,Flat. Absent: exact search over all documents.",
        only=VECTORS, min_length=1,
    )  # fmt: skip
    faiss_search: str | None = key(
        "Parameters of its search, such as nprobe=32 or efSearch=64. Absent: an IVF index looks through one list in "
        "16.", only=FAISS, min_length=1,
    )  # fmt: skip
    dim: int | None = key("The first so many numbers of each vector (Matryoshka). Absent: all.", only=VECTORS, ge=1)

    token_precision: TokenPrecision | None = key(
        "How token vectors are kept; residual4, 2 and 1 are the nearest of many centroids and so many bits for each "
        "number. Default float16.", only=TOKENS, derive=lambda config: "float16"
    )  # fmt: skip
    pool_factor: float | None = key(
        "The token vectors of a document become fewer by this factor: means of those that are alike. Absent: all stay.",
        only=TOKENS, ge=1,
    )  # fmt: skip
    token_candidates: TokenCandidates | None = key(
        "Where documents come from that are scored by their token vectors: dense or lexical (the best of this search), "
        "tokens (those with tokens near the query's), all. Default the first of them that the index has.",
        only=TOKENS, derive=default_candidates,
    )  # fmt: skip
    rescore_factor: int = key("Documents scored anew for each one asked for.", 4, only=APPROXIMATE, ge=1)

    batch_size: int | None = key("Texts encoded at once. Default 32.", only=MODEL, derive=lambda config: 32, ge=1)
    shard_size: int = key("Documents of a shard: what a killed run encodes again.", 50_000, only=MODEL, ge=1)
    seed: int = key("Of samples: for int8 ranges and centroids, for training FAISS, for measuring recall.", 42, ge=0)

    @property
    def fits_vectors(self) -> bool:
        """Whether dense vectors are kept by what is fitted to a sample of them."""
        return "int8" in (self.vector_precision, self.rescore_precision)

    @property
    def fits_tokens(self) -> bool:
        return self.has_centroids or self.token_precision == "int8"

    @property
    def has_centroids(self) -> bool:
        """Of token vectors."""
        return self.has_token_lists or self.token_precision in RESIDUAL_BITS

    @property
    def has_token_lists(self) -> bool:
        """Whether documents are found by the centroids of their token vectors."""
        return self.token_candidates == "tokens"

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.bm25 and self.embedder is None:
            yield "embedder", "is missing, and bm25 is false; an index needs one of them"
        if self.token_candidates in (DENSE, LEXICAL) and self.token_candidates not in self.representations:
            yield "token_candidates", f"is {self.token_candidates}, which is not among the representations; add it"
        if len(set(self.representations or ())) < len(self.representations or ()):
            yield "representations", "has one of them twice; give each once"


BUILDS = Only("building an index", lambda config: config.corpus is not None)
BUILDS_WORDS = Only("building an index with bm25", lambda config: config.corpus is not None and config.bm25)
BUILDS_VECTORS = Only(
    "building an index with an embedder", lambda config: config.corpus is not None and config.embedder is not None
)
BUILDS_PASSAGES = Only(
    "building an index of texts", lambda config: config.corpus is not None and row_file(Path(config.corpus)) is None
)
ENCODES = Only("work with an embedder", lambda config: config.embedder is not None or config.add is not None)


class IndexConfig(IndexOptions, EngineOptions):
    """One run of the command: build, change, or export an index."""

    aliases: ClassVar = IndexOptions.aliases | {  # FlagEmbedding's
        "encoder": "embedder", "index_factory": "faiss_index", "max_passage_length": "max_length",
        "max_query_length": "query_max_length",
    }  # fmt: skip
    main_keys: ClassVar = ("corpus", "output", "embedder", "bm25", "add")
    groups: ClassVar = IndexOptions.groups | EngineOptions.groups | {"corpus": "Index"}
    only_for: ClassVar = (
        dict.fromkeys(EmbedderOptions.model_fields, BUILDS_VECTORS)
        | dict.fromkeys(("device", "devices", "trust_remote_code"), ENCODES)
        | dict.fromkeys(("embedder", "bm25", "seed"), BUILDS)
        | {"language": BUILDS_WORDS, "passage_tokens": BUILDS_PASSAGES}
    )

    corpus: FileOrFolder | None = key(
        "The documents: JSON lines, gzip, Parquet, a folder in BEIR layout, or text and Markdown files.", min_length=1
    )
    output: OutputPath = Field(min_length=1, description="The folder of the index.")
    add: FileOrFolder | None = key("Documents to add to the index, or to replace those of the same id.", min_length=1)
    remove: FileOrFolder | None = key("A file of ids, one a line: documents to take out of the index.", min_length=1)
    parquet: OutputPath | None = key("A file to write: id, text, metadata and vector of every document.", min_length=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.corpus is None and self.add is self.remove is self.parquet is None:
            yield "corpus", "is missing; give the documents, or add, remove or parquet with an index that is there"
        if self.corpus is not None and (self.add or self.remove):
            yield "corpus", "builds an index, and add and remove change one; give the one or the other"

    def ids_to_remove(self) -> list[str]:
        """Those that the file has, one a line."""
        return [] if self.remove is None else [line for _, line in text_lines(Path(self.remove))]
