"""Builds and changes the folder of an index, part by part.

An update writes new parts beside the old ones, then index.json, then removes the old: a reader finds the one index or
the other, and a killed update leaves the old one and is continued by the same call. Encoding is done for new documents
alone; everything else is made anew, so that an index after updates searches as one does that was built of the same
documents in the same order: those that stay, then those that came.
"""

import importlib.util
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rag_retrieval.core.config import LOCAL, EngineOptions
from rag_retrieval.core.distributed import on_main, process_group
from rag_retrieval.core.files import STAGE_NAME, WorkFolder, content_of, digest_of, flush_to_disk, locked
from rag_retrieval.core.shard_folder import ShardWork
from rag_retrieval.core.shards import run_shards
from rag_retrieval.data.corpus import Corpus, build_corpus
from rag_retrieval.data.documents import Document, read_documents, row_file, source_content
from rag_retrieval.data.records import DataError
from rag_retrieval.models.embedding_files import read_settings
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.settings import ModelFiles, resolve_model_path
from rag_retrieval.retrieval.bm25 import build_bm25
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index_files import (
    IndexState,
    check_folder,
    check_same,
    fingerprint,
    model_names,
    sizes_of,
)

logger = logging.getLogger(__name__)

BM25_LIBRARIES = ("bm25s", "Stemmer", "jieba")
VECTOR_SHARDS = "rag_retrieval.retrieval.vector_shards"


def build(source: str | Path, folder: Path, options: IndexOptions, engine: EngineOptions = LOCAL) -> None:
    """See `index.build_index`."""
    with writing(folder):
        on_main(lambda: check_options(options))
        before, depends_on = on_main(lambda: (IndexState.read(folder), fingerprint(options)))
        corpus = on_main(lambda: build_documents(source, folder, options.passage_tokens))
        made_from = {"corpus": on_main(lambda: corpus_name(corpus))} | depends_on
        if row_file(Path(source)) is None:
            made_from["passage_tokens"] = options.passage_tokens
        parts = {}
        if before:
            on_main(before.check_files)
            try:
                check_same(folder, before.made_from, made_from)
            except ValueError:
                on_main(lambda: remove_others(before))  # the documents of another corpus
                raise
            made_from, parts = before.made_from | made_from, before.parts
            options = with_kept_parts(options, before.options)
        state = IndexState(folder, made_from, options, {"corpus": corpus.name} | parts, {})
        finish(state, engine, old=None)


def with_kept_parts(options: IndexOptions, before: IndexOptions) -> IndexOptions:
    """The options, and those of the parts that the index has and nobody asks for now."""
    words = options if options.bm25 else before
    dense = options if options.embedder is not None else before
    faiss = dense if dense.faiss_index is not None else before
    kept = {name: getattr(words, name) for name in ("bm25", "language")}
    return dense.model_copy(update=kept | {name: getattr(faiss, name) for name in ("faiss_index", "faiss_search")})


def build_documents(source: str | Path, folder: Path, passage_tokens: int) -> Path:
    made_from = [source_content(source), passage_tokens if row_file(Path(source)) is None else None]

    def write(part: Path) -> None:
        build_corpus(read_documents(source, passage_tokens), part)

    return WorkFolder(folder).stage("corpus", made_from, write)


def corpus_name(corpus: Path) -> str:
    """What identifies documents in their order, whatever file they came from."""
    return f"{len(Corpus(corpus)):,} documents, {content_of(corpus)}"


def update(
    folder: Path, source: str | Path | None, ids: Collection[str], engine: EngineOptions, local: Mapping[str, Any]
) -> None:
    """See `Index.update`. local: options of `LOCAL_KEYS`."""
    with writing(folder):
        before = on_main(lambda: IndexState.read(folder, local))
        if before is None:
            raise ValueError(f"{folder}: there is no index that could be changed; build it first")
        on_main(before.check_files)
        if source is not None:
            on_main(lambda: check_same(folder, before.made_from, fingerprint(before.options)))
        corpus = on_main(lambda: change_documents(before, source, ids))
        made_from = before.made_from | {"corpus": on_main(lambda: corpus_name(corpus))}
        # vectors that are copied keep their ranges and codes
        parts = {kind: name for kind, name in before.parts.items() if kind == "ranges"} | {"corpus": corpus.name}
        finish(replace(before, made_from=made_from, parts=parts), engine, old=before)


def change_documents(before: IndexState, source: str | Path | None, ids: Collection[str]) -> Path:
    old, work = Corpus(before.path("corpus")), WorkFolder(before.folder)
    removed = set(ids)
    unknown = sorted(id_ for id_ in removed if old.row_of_id(id_) is None)
    if unknown:
        shown = ", ".join(map(repr, unknown[:3]))
        raise DataError(f"{before.folder}: {len(unknown):,} of the ids to remove are in no document, such as {shown}.")
    new = source and Corpus(build_documents(source, before.folder, before.options.passage_tokens))
    replaced = sum(old.row_of_id(new.id(row)) is not None for row in range(len(new))) if new else 0
    if new:
        logger.info("%s: %d documents, %d of them replace one of the same id", source, len(new), replaced)

    def documents() -> Iterator[Document]:
        for row in range(len(old)):
            id_ = old.id(row)
            if id_ not in removed and (not new or new.row_of_id(id_) is None):
                yield old.document(row)
        yield from map(new.document, range(len(new))) if new else ()

    made_from = [before.parts["corpus"], new and new.folder.name, sorted(removed)]
    changed = work.stage("corpus", made_from, lambda part: build_corpus(documents(), part))
    if not len(Corpus(changed)):
        raise DataError(f"{before.folder}: no document would be left; remove the folder instead.")
    return changed


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the lock of the index, as one of the processes of a launch. Raises ValueError where others hold it. An error
    of the system that names no file, as that of a full disk, gets the folder's name."""
    busy = f"{folder}: another process writes this index; wait for it, or take another output"
    with process_group(), ExitStack() as lock:  # which the main process alone takes

        def take() -> None:
            check_folder(folder)
            lock.enter_context(locked(folder / ".lock", busy))

        on_main(take)
        try:
            yield
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, error.strerror, str(folder)) from error
            raise


def finish(state: IndexState, engine: EngineOptions, old: IndexState | None) -> None:
    """Build the parts that are missing, then switch to them. old: the index whose vectors are copied for the documents
    that it has too."""
    options, parts = state.options, dict(state.parts)
    state = replace(state, parts=parts)
    if options.bm25 and "bm25" not in parts:
        parts["bm25"] = on_main(lambda: build_words(state))
    if options.embedder is not None:
        if "vectors" not in parts:
            encode(state, parts, engine, old)
        if options.faiss_index is not None and "faiss" not in parts:
            parts["faiss"] = on_main(lambda: build_approximate(state))
        state = on_main(lambda: measured(state))
    on_main(lambda: switch(state))


def measured(state: IndexState) -> IndexState:
    """With what its searches miss."""
    from rag_retrieval.retrieval.searches import open_searches
    from rag_retrieval.retrieval.token_codec import read_loss
    from rag_retrieval.retrieval.vector_shards import fitted_folder

    options = state.options
    searches = open_searches(state.paths, options, represent=None)
    recall = {
        stage: search.recall(options.seed)
        for stage, search in searches.items()
        if stage != LEXICAL and not search.is_exact
    }
    loss = read_loss(fitted_folder(state.paths)) if MULTI_VECTOR in searches else {}
    return replace(state, recall=recall.get(DENSE), token_recall=recall.get(MULTI_VECTOR), token_loss=loss or None)


def check_options(options: IndexOptions) -> None:
    """Raises ValueError for what later stages would fail at, hours later."""
    missing = [name for name in BM25_LIBRARIES if importlib.util.find_spec(name) is None]
    if options.bm25 and missing:
        raise ValueError(f"an index of words needs {', '.join(missing)}; run: pip install -e '.[mine]'")
    if options.embedder is not None:
        given = read_settings(ModelFiles(resolve_model_path(options.embedder))).get("representations", (DENSE,))
        if not set(options.representations) <= set(given):
            asked, names = ", ".join(options.representations), ",".join(given)
            found = f"{options.embedder} gives {', '.join(given)}, and the index is of {asked}"
            raise ValueError(f"representations: {found}; say representations: {names}, or take another model")
    if options.faiss_index is not None:
        from rag_retrieval.retrieval.approximate import check_faiss

        check_faiss(options)


def build_words(state: IndexState) -> str:
    made_from = [state.made_from["corpus"], state.made_from["words"]]
    corpus, language = Corpus(state.path("corpus")), state.options.language
    return WorkFolder(state.folder).stage("bm25", made_from, lambda part: build_bm25(corpus, part, language)).name


def encode(state: IndexState, parts: dict[str, str], engine: EngineOptions, old: IndexState | None) -> None:
    """Adds what the model gives to the parts, and what it is kept by: ranges of int8, centroids, codes."""
    from rag_retrieval.retrieval.vector_shards import fitted_folder

    options, folder = state.options, state.folder.resolve()
    made_from = {name: state.made_from[name] for name in ("corpus", "model", *model_names(options))}
    corpus = folder / parts["corpus"]
    if options.fits_vectors or options.fits_tokens:
        if "ranges" not in parts:
            parts["ranges"] = f"ranges-{digest_of([made_from, options.seed])}"
            work = ShardWork(f"{VECTOR_SHARDS}:open_samples", {"corpus": corpus, "options": options})
            run_shards(folder / parts["ranges"], made_from, [1], work, engine, description="ranges", unit="samples")
        made_from["ranges"] = parts["ranges"]
    parts["vectors"] = f"vectors-{digest_of([made_from, options.shard_size])}"
    total, size = len(Corpus(corpus)), options.shard_size
    sizes = [min(size, total - start) for start in range(0, total, size)]
    arguments = {
        "corpus": corpus,
        "options": options,
        "fitted": fitted_folder({kind: folder / name for kind, name in parts.items()}),
        "old": old and (folder / old.parts["corpus"], folder / old.parts["vectors"]),
    }
    work = ShardWork(f"{VECTOR_SHARDS}:open_shards", arguments)
    run_shards(folder / parts["vectors"], made_from, sizes, work, engine, description="encoding", unit="documents")


def build_approximate(state: IndexState) -> str:
    from rag_retrieval.retrieval.approximate import build_faiss
    from rag_retrieval.retrieval.vector_shards import open_vectors

    made_from = [state.parts["vectors"], state.options.faiss_index, state.options.seed]
    vectors = open_vectors(state.paths, state.options)[-1]
    stage = WorkFolder(state.folder).stage
    return stage("faiss", made_from, lambda part: build_faiss(vectors, state.options, part)).name


def switch(state: IndexState) -> None:
    """Let the index be the one of these parts."""
    for path in state.paths.values():
        flush_to_disk(path)
    replace(state, sizes=sizes_of(state.folder, state.parts)).write()
    remove_others(state)


def remove_others(state: IndexState) -> None:
    """Parts that are not the index's: of another state, or of a build that was killed."""
    for path in state.folder.iterdir():
        if STAGE_NAME.fullmatch(path.name) and path.name not in state.parts.values():
            shutil.rmtree(path)
