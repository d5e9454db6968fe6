"""Hard negatives for the queries of a data set: `mine(config)`, from the sources to the written file.

The work is cut into parts of `PART` queries, sorted by their text, each written whole or not at all, and so are index
and vectors. The same command after a kill continues there and writes the same bytes, whatever the order of the
source. Another set of queries may change the last bit of a score: vectors of queries are computed in batches.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rag_retrieval.core.files import WorkFolder, atomic_write, check_new_file, lock_file_of, locked
from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import find_file
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.documents import PASSAGE_TOKENS, source_content
from rag_retrieval.data.records import DataError
from rag_retrieval.mining.config import FUSED, RANDOM, MiningConfig, summary_file
from rag_retrieval.mining.miner import Miner, RandomSearch, device_of
from rag_retrieval.mining.output import Mined, MiningSummary, lines_of, text_writer
from rag_retrieval.mining.queries import Query, QuerySet, demand_labels_above_zero, read_queries
from rag_retrieval.models.settings import ModelFiles, model_content, resolve_model_path
from rag_retrieval.retrieval.building import build_documents
from rag_retrieval.retrieval.candidates import Search
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.fusion import FUSION_FILE, FusedSearch, Fusion
from rag_retrieval.retrieval.index import Index, build_index
from rag_retrieval.retrieval.index_files import fingerprint

PART = 256  # queries
WITHOUT_EFFECT = {"data", "corpus", "index", "split", "output", "output_format", "labels", "overwrite", "work_dir",
                  "device"}  # fmt: skip


def mine(config: MiningConfig) -> MiningSummary:
    """Write `config.output` and, beside it, the summary as NAME.summary.json. Returns the summary.

    Raises DataError for data that cannot be used, and ValueError for models, an output that exists, a work folder
    in use, and when no query got a negative. The output is then not written, and the work folder stays.
    """
    output = Path(config.output)
    work = WorkFolder(Path(config.work_dir or f"{output}.work"))
    busy = f"output: another run is writing {output}; wait for it, or choose another"
    with locked(lock_file_of(output), busy):
        check_output(config, output)
        with work.locked():
            source = open_source(config, work)
            queries = read_queries(config.data, config.split, source.documents)
            if config.output_format != "pos_neg" and config.labels == "relevance":
                demand_labels_above_zero(queries)
            parts = mine_parts(config, source, queries, work)
            summary = write_results(config, source.documents, queries, parts)
        if config.work_dir is None:
            work.remove()
    return summary


def check_output(config: MiningConfig, output: Path) -> None:
    """Raises ValueError for an output that is a folder, that exists, or that is one of the sources."""
    check_new_file(output, config.overwrite)
    data = Path(config.data)
    names = [f"{name}.jsonl{ending}" for name in ("corpus", "queries") for ending in ("", ".gz")]
    sources = [data / name for name in names] if data.is_dir() else [data, Path(config.corpus or data)]
    if output.resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"output: {output} is one of the sources, which would be lost; choose another output")


class Source(NamedTuple):
    """search: what finds candidates among the documents. made_from: what it depends on, as JSON values."""

    documents: Corpus
    search: Search
    made_from: Any


def open_source(config: MiningConfig, work: WorkFolder) -> Source:
    """Of the index that is named, or of one built from the corpus. Raises ValueError for candidates that the index does
    not have."""
    if not Path(config.data).exists():
        raise DataError(f"{config.data}: no such file or folder; the current folder is {Path.cwd()}.")
    if config.index is None and config.candidates == RANDOM:
        documents = Corpus(build_documents(corpus_of(config), work.path, PASSAGE_TOKENS))
        source = Source(documents, RandomSearch(len(documents), config.seed), documents.folder.name)
    else:
        index = own_index(config, work) if config.index is None else open_index(Path(config.index), config)
        file = index.folder / FUSION_FILE
        fusion = Fusion.read(file) if file.is_file() else Fusion()
        source = Source(index.documents, search_of(index, fusion, config), [index.made_from, fusion.weights])
    if config.first_rank > len(source.documents):
        found = f"first_rank is {config.first_rank}, and there are {len(source.documents)} documents"
        raise DataError(f"{config.data}: {found}, so that no candidate can have that rank; lower first_rank.")
    return source


def search_of(index: Index, fusion: Fusion, config: MiningConfig) -> Search:
    if config.candidates == RANDOM:
        return RandomSearch(len(index), config.seed)
    if config.candidates == FUSED:
        return FusedSearch(index.searches, fusion)
    if config.candidates not in index.searches:
        known = ", ".join((*index.searches, FUSED, RANDOM))
        raise ValueError(f"candidates: {index.folder} has {known}; found {config.candidates}")
    return index.searches[config.candidates]


def corpus_of(config: MiningConfig) -> Path:
    is_folder = Path(config.data).is_dir()
    return find_file(Path(config.data), "corpus.jsonl").parent if is_folder else Path(config.corpus)


def own_index(config: MiningConfig, work: WorkFolder) -> Index:
    """Of the candidates that are asked for, where the work folder does not have it."""
    source, options = corpus_of(config), index_options(config)
    made_from = [source_content(source), source.is_dir(), fingerprint(options), config.seed]
    folder = work.stage("index", made_from, lambda folder: build_index(source, folder, options), resumes=True)
    return open_index(folder, config)


def open_index(folder: Path, config: MiningConfig) -> Index:
    return Index(folder, device=device_of(config), trust_remote_code=config.trust_remote_code)


def index_options(config: MiningConfig) -> IndexOptions:
    """Raises ValueError for a device that this machine lacks."""
    words = {"bm25": config.candidates != "dense", "language": config.language}
    if config.candidates == "bm25":
        return IndexOptions(**words)
    prefixes = {"query": config.query_prefix, "document": config.document_prefix}
    modules = ModelFiles(resolve_model_path(config.dense_model)).modules
    return IndexOptions(
        **words,
        embedder=config.dense_model,
        device=device_of(config),
        trust_remote_code=config.trust_remote_code,
        pooling=config.pooling,
        prompts={kind: prefix for kind, prefix in prefixes.items() if prefix is not None} or None,
        max_length=config.dense_max_len,
        normalize=config.similarity == "cosine" or "Normalize" in modules,  # others keep their length
        batch_size=config.dense_batch_size,
        vector_precision=config.vector_dtype,
        faiss_index=config.faiss_index,
        seed=config.seed,
    )


def mine_parts(config: MiningConfig, source: Source, queries: QuerySet, work: WorkFolder) -> Path:
    """The folder of all parts, a file for every `PART` queries with a line for each."""
    settings = config.model_dump(exclude=WITHOUT_EFFECT)
    for key in ("dense_model", "reranker", "guide"):
        settings[key] = settings[key] and model_content(settings[key])
    made_from = [source.made_from, queries.digest(), settings]

    def build(folder: Path) -> None:
        miner = Miner(config, source.documents, source.search)
        (folder / "words").write_text(miner.search.words)
        missing = [part for part in _parts(queries) if not (folder / part[0]).exists()]
        num_missing = sum(len(part) for _, part in missing)
        done = len(queries.queries) - num_missing
        with Progress(len(queries.queries), "mining", "queries", done) as progress:
            for name, part in missing:
                lines = []
                for mined in miner.mine(part):
                    lines.append(json.dumps(asdict(mined)) + "\n")
                    progress.update()
                with atomic_write(folder / name) as temporary:
                    temporary.write_text("".join(lines))

    return work.stage("parts", made_from, build, resumes=True)


def _parts(queries: QuerySet) -> Iterator[tuple[str, list[Query]]]:
    for start in range(0, len(queries.queries), PART):
        yield f"from-{start:09d}.jsonl", queries.queries[start : start + PART]


def _all_mined(queries: QuerySet, parts: Path) -> Iterator[tuple[Query, Mined]]:
    for name, part in _parts(queries):
        with (parts / name).open() as file:
            for query, line in zip(part, file, strict=True):
                yield query, Mined(**json.loads(line))


def write_results(config: MiningConfig, corpus: Corpus, queries: QuerySet, parts: Path) -> MiningSummary:
    """Both files, each under another name until it is whole; the summary first."""
    num_positives = sum(len(query.positives) for query in queries.queries)
    counts = (len(corpus), queries.read, queries.without_text, len(queries.queries), num_positives)
    summary = MiningSummary(*counts, words=(parts / "words").read_text())
    with atomic_write(Path(config.output)) as temporary:
        with text_writer(temporary, compressed=config.output.endswith(".gz")) as file:
            for query, mined in _all_mined(queries, parts):
                summary.add(mined, config.num_negatives)
                if mined.negatives:
                    for line in lines_of(query, mined, corpus, config.output_format, config.labels):
                        file.write(line + "\n")
                        summary.lines += 1
        if not summary.kept:
            counts = summary.describe(config.num_negatives)
            raise ValueError(f"no query got a negative; widen the window or the margins:\n{counts}")
        with atomic_write(summary_file(config.output)) as summary_temporary:
            summary_temporary.write_text(json.dumps(summary.to_dict(), indent=2) + "\n")
    return summary
