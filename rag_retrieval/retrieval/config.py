"""The keys of an index: what is built from a corpus, and the command that builds, changes and exports it."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from rag_retrieval.core.config import EngineOptions, FileOrFolder, ModelName, Only, OutputPath, key
from rag_retrieval.data.documents import PASSAGE_TOKENS, row_file
from rag_retrieval.data.readers import text_lines
from rag_retrieval.data.words import AUTO
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.vectors import VectorPrecision

DENSE = Only("indexes with an embedder", lambda config: config.embedder is not None)
WORDS = Only("indexes with bm25", lambda config: config.bm25)
FAISS = Only("indexes with faiss_index", lambda config: config.faiss_index is not None)
APPROXIMATE = Only(
    "indexes with rescore_precision or faiss_index",
    lambda config: config.faiss_index is not None or config.rescore_precision is not None,
)


class IndexOptions(EmbedderOptions):
    """What an index holds. Those for opening a model are the embedder's."""

    groups: ClassVar = {"device": "Opening the embedder", "embedder": "What is indexed", "vector_precision": "Vectors"}
    only_for: ClassVar = dict.fromkeys(EmbedderOptions.model_fields, DENSE)

    embedder: ModelName | None = key(
        "An embedding model: folder, hub name, or package:NAME. Absent: no vectors.", min_length=1
    )
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
        "How the vectors are kept. Default float16.", only=DENSE, derive=lambda config: "float16"
    )
    rescore_precision: Literal["float32", "float16", "int8"] | None = key(
        "Of a finer copy on the disk that scores the best of the search anew. Absent: there is none.", only=DENSE
    )
    faiss_index: str | None = key(
        "An index of FAISS by its factory name, such as IVF1024,Flat. Absent: exact search over all documents.",
        only=DENSE, min_length=1,
    )  # fmt: skip
    faiss_search: str | None = key(
        "Parameters of its search, such as nprobe=32 or efSearch=64. Absent: an IVF index looks through one list in "
        "16.", only=FAISS, min_length=1,
    )  # fmt: skip
    rescore_factor: int = key("Documents scored anew for each one asked for.", 4, only=APPROXIMATE, ge=1)
    dim: int | None = key("The first so many numbers of each vector (Matryoshka). Absent: all.", only=DENSE, ge=1)
    batch_size: int | None = key("Texts encoded at once. Default 32.", only=DENSE, derive=lambda config: 32, ge=1)
    shard_size: int = key("Documents of a shard: what a killed run encodes again.", 50_000, only=DENSE, ge=1)
    seed: int = key("Of the samples for int8 ranges, for training FAISS and for measuring recall.", 42, ge=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.bm25 and self.embedder is None:
            yield "embedder", "is missing, and bm25 is false; an index needs one of them"


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
