"""`Index`: the documents of a corpus with what they are searched by, words or vectors or both, in one folder.

torch is not imported where words alone are searched, or the embedder is an exported folder.
"""

import json
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.filesize import decimal

from rag_retrieval.core.config import LOCAL, EngineOptions
from rag_retrieval.core.files import atomic_write
from rag_retrieval.core.log import Progress
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.bm25 import BM25, Bm25Search
from rag_retrieval.retrieval.candidates import Search
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.filters import Filters
from rag_retrieval.retrieval.index_files import INDEX_FILE, LOCAL_KEYS, IndexState, sizes_by_stage, words_of

if TYPE_CHECKING:
    from rag_retrieval.infer.embedder import Embedder
    from rag_retrieval.retrieval.encoding import Encoded
    from rag_retrieval.retrieval.stored_vectors import Vectors

EXPORTED = 4096  # rows written to Parquet at once
SAME_VECTOR = 0.98  # least cosine of a document's vector with itself, in any precision


def build_index(
    source: str | Path, folder: str | Path, options: IndexOptions | None = None, engine: EngineOptions = LOCAL
) -> "Index":
    """Build what the folder does not have: documents, words, vectors. The same call after a kill continues.

    source: see `data.documents`. Under `accelerate launch` every process calls it, and they share the encoding.
    Raises DataError for a source that cannot be read or has one id twice; ValueError for an index in the folder that
    is made from something else, with each name that differs, for a folder that holds other things, where another
    process writes there, and for a model that cannot be opened.
    """
    from rag_retrieval.retrieval.building import build

    options = options or IndexOptions()
    build(source, Path(folder), options, engine)
    return Index(folder, **options.given(*LOCAL_KEYS))


class Opened(NamedTuple):
    """Documents, the searches over them and their metadata, which belong together: `Index.update` replaces all at
    once."""

    documents: Corpus
    searches: dict[str, Search]
    filters: Filters


def check_embedder(embedder: object) -> None:
    from rag_retrieval.infer.embedder import Embedder

    if not isinstance(embedder, Embedder):
        raise ValueError(f"embedder: expected an open Embedder, found {type(embedder).__name__}")


class Index:
    """An index that was built. Several threads may search one.

    documents: the corpus, by row. searches: "bm25", "dense", "lexical", "multi_vector", those that the index has.
    opened: both, for who needs them of one state while another thread may update or refresh. made_from: all that the
    index depends on, by name. sizes: bytes on the disk of each search, and of the "texts".

    What searches miss was measured when the index was built. recall: the part of the nearest documents that an
    approximate dense search finds; None where it is exact. token_recall: the part of the best by the token vectors that
    are kept; None where all documents are scored. token_loss: what these find of the best by whole vectors, `recall`
    and `ndcg`; None where no number has fewer than 16 bits.

    embedder: in place of the one that the index names, which is opened when it is first needed. device, devices,
    trust_remote_code: for that, see `Embedder`. Raises ValueError for a folder without a finished index, a damaged one,
    and, when a model is opened, for another model than the index was made with.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        embedder: "Embedder | None" = None,
        device: str | None = None,
        devices: list[str] | None = None,
        trust_remote_code: bool = False,
    ):
        if embedder is not None:
            check_embedder(embedder)
        self.folder = Path(folder)
        self._given = embedder
        self._local = {"device": device, "devices": devices, "trust_remote_code": trust_remote_code}
        self._embedder: Embedder | None = None
        self._last_queries: tuple[list[str], Encoded] | None = None
        self._lock, self._refreshing = threading.Lock(), threading.Lock()
        self._open()

    def _open(self) -> None:
        """Everything is mapped here, so that an update that removes the files does no harm."""
        self._seen = self._manifest()
        state = IndexState.read(self.folder, self._local)
        if state is None:
            found = "no finished index" if self.folder.is_dir() else "no such folder"
            raise ValueError(f"{self.folder}: {found}; rag-retrieval index writes one, or continues one")
        try:
            state.check_files()
            documents, searches = Corpus(state.path("corpus")), self._searches(state)
        except (ValueError, OSError):
            if IndexState.read(self.folder, self._local) == state:
                raise
            return self._open()  # another process switched to a newer one
        self.made_from, self.options, self.sizes = state.made_from, state.options, sizes_by_stage(state.sizes)
        self.recall, self.token_recall, self.token_loss = state.recall, state.token_recall, state.token_loss
        self.opened = Opened(documents, searches, Filters(documents))

    def _manifest(self) -> tuple[int, int] | None:
        """What differs between one state's index.json and the next one's; None without a file."""
        try:
            found = (self.folder / INDEX_FILE).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def refresh(self) -> bool:
        """Open the newer state where another process has changed the index, and say whether there is one. Costs
        microseconds where there is none. While one thread opens it, others search the old one.

        Raises ValueError, once for each change, for an index that is damaged, or made by another model or with other
        options; the old state stays."""
        if self._manifest() in (self._seen, None) or not self._refreshing.acquire(blocking=False):
            return False
        try:
            self._seen = self._manifest()
            state = IndexState.read(self.folder, self._local)
            now = state.made_from if state else {}
            differing = [name for name in self.made_from | now if now.get(name) != self.made_from.get(name)]
            if state and set(differing) - {"corpus"}:
                names = ", ".join(name for name in differing if name != "corpus")
                raise ValueError(f"{self.folder}: it is made in another way now ({names}); open it again")
            self._open()
        finally:
            self._refreshing.release()
        return True

    def _searches(self, state: IndexState) -> dict[str, Search]:
        searches: dict[str, Search] = {}
        if "bm25" in state.parts:
            was, now = state.made_from["words"], words_of(state.options)
            if was != now:
                found = f"words: was {was!r}, now {now!r}"
                raise ValueError(f"{self.folder}: words are made in another way now ({found}); build the index again")
            searches[BM25] = Bm25Search(state.path("bm25"))
        if "vectors" in state.parts:
            from rag_retrieval.retrieval.searches import open_searches

            searches |= open_searches(state.paths, state.options, self.represent_queries, self._given)
        return searches

    @property
    def documents(self) -> Corpus:
        return self.opened.documents

    @property
    def searches(self) -> dict[str, Search]:
        return self.opened.searches

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def embedder(self) -> "Embedder":
        """The model of the vectors. ValueError for an index without, and where it is not the one that made them."""
        with self._lock:
            if self._embedder is None:
                self._embedder = self._open_embedder()
        return self._embedder

    def _open_embedder(self) -> "Embedder":
        opened = self.opened
        if self.options.embedder is None:
            raise ValueError(f"{self.folder}: an index of words alone; build it with an embedder")
        from rag_retrieval.retrieval.encoding import open_embedder, represent_with

        if self._given is None:
            name, expected = self.options.embedder, self.made_from["model"]
            found = model_content(name)
            if found != expected:
                raise ValueError(
                    f"{self.folder}: {name} now holds another model than the index was made with (model: was "
                    f"{expected}, now {found}); bring that model back, or build the index again"
                )
            return open_embedder(self.options)
        own = represent_with(self._given, "document", self.options)([opened.documents.text(0)])
        kinds = self.options.representations
        if min(opened.searches[kind].similarity_of_first(getattr(own, kind)) for kind in kinds) < SAME_VECTOR:
            raise ValueError(
                f"{self.folder}: the given embedder has another vector for the first document than the index; expected "
                f"the model and options of the index: {json.dumps(self.made_from, ensure_ascii=False)}"
            )
        return self._given

    def close(self) -> None:
        """Close the embedder that was opened here; a search by vectors opens it again."""
        with self._lock:
            if self._embedder is not None and self._embedder is not self._given:
                self._embedder.close()
            self._embedder = None

    def represent_queries(self, texts: list[str]) -> "Encoded":
        """Several searches ask for the same queries one after another, and one forward serves them all."""
        from rag_retrieval.retrieval.encoding import represent_with

        last = self._last_queries
        if last is None or last[0] != texts:
            last = list(texts), represent_with(self.embedder, "query", self.options)(texts)
            self._last_queries = last
        return last[1]

    def describe(self) -> str:
        """`9,358 documents; bm25 (english 7,482; 1.2 MB), dense (float16; 7.2 MB); texts 2.4 MB`, and what searches
        that are not exact miss."""
        shown = [f"{name} ({self._kind(name)}; {decimal(self.sizes[name])})" for name in self.searches]
        lines = [f"{len(self):,} documents", ", ".join(shown), f"texts {decimal(self.sizes['texts'])}"]
        if self.recall is not None:
            lines.append(f"finds {self.recall:.1%} of the 10 nearest (documents as queries)")
        if self.token_recall is not None:
            candidates = self.options.token_candidates
            lines.append(f"candidates of {candidates} have {self.token_recall:.1%} of the 10 best by token vectors")
        if self.token_loss is not None:
            found = f"{self.token_loss['recall']:.1%} of the 10 best by float32, nDCG@10 {self.token_loss['ndcg']:.4f}"
            lines.append(f"{self.options.token_precision} finds {found}")
        return "; ".join(lines)

    def _kind(self, stage: str) -> str:
        search, options = self.searches[stage], self.options
        return {
            BM25: lambda: search.words,
            DENSE: lambda: options.faiss_index or options.vector_precision,
            LEXICAL: lambda: f"{search.entries:,} weights",
            MULTI_VECTOR: lambda: f"{len(search.documents.vectors):,} vectors in {options.token_precision}",
        }[stage]()

    # ---- changes

    def add(self, source: str | Path, engine: EngineOptions = LOCAL) -> None:
        """Add the documents of a source; one whose id is there already takes the place of the old one. The folder
        changes as a whole or not at all, and only new documents are encoded. Raises as `build_index`."""
        self.update(source, (), engine)

    def remove(self, ids: Collection[str]) -> None:
        """Take documents out. Raises DataError for ids that no document has, and where none would be left."""
        self.update(None, ids)

    def update(self, source: str | Path | None, ids: Collection[str], engine: EngineOptions = LOCAL) -> None:
        """Both in one change."""
        from rag_retrieval.retrieval.building import update

        update(self.folder, source, ids, engine, self._local)
        self._open()

    # ---- export

    def vectors(self, size: int = EXPORTED) -> Iterator[np.ndarray]:
        """The finest vectors of all documents in their order, as float32, at most `size` at a time. ValueError for an
        index without."""
        return self._finest(self.opened).blocks(size)

    def _finest(self, opened: Opened) -> "Vectors":
        if DENSE not in opened.searches:
            raise ValueError(f"{self.folder}: an index without vectors; build it with an embedder")
        return opened.searches[DENSE].finest

    def to_parquet(self, path: str | Path) -> None:
        """Write id, text, metadata (as JSON) and vector (a FixedSizeList of float32) of every document, whole or not
        at all. Memory does not grow with the index."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        opened, row, writer = self.opened, 0, None
        blocks, total = self._finest(opened).blocks(EXPORTED), len(opened.documents)
        with atomic_write(Path(path)) as temporary, Progress(total, "exporting", "documents") as progress:
            try:
                for vectors in blocks:
                    documents = [opened.documents.document(row + place) for place in range(len(vectors))]
                    metadata = [json.dumps(document.metadata, ensure_ascii=False) for document in documents]
                    table = pa.table({
                        "id": pa.array([document.id for document in documents], pa.string()),
                        "text": pa.array([document.text for document in documents], pa.string()),
                        "metadata": pa.array(metadata, pa.string()),
                        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
                    })  # fmt: skip
                    writer = writer or pq.ParquetWriter(temporary, table.schema)
                    writer.write_table(table)
                    row += len(vectors)
                    progress.update(len(vectors))
            finally:
                if writer:
                    writer.close()
