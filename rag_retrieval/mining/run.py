"""Hard negatives for the queries of a data set: `mine(config)`, from the sources to the written file.

The work is cut into parts of `PART` queries, sorted by their text, each written whole or not at all, and so are index
and vectors. The same command after a kill continues there and writes the same bytes, whatever the order of the
source. Another set of queries may change the last bit of a score: vectors of queries are computed in batches.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rag_retrieval.core.config import EngineOptions
from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.core.files import (
    WorkFolder,
    atomic_write,
    check_new_file,
    content_of,
    digest_of,
    lock_file_of,
    locked,
)
from rag_retrieval.core.shard_folder import MakeShard, ShardWork
from rag_retrieval.core.shards import run_shards
from rag_retrieval.data.beir import find_file
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.documents import PASSAGE_TOKENS, source_content
from rag_retrieval.data.records import DataError
from rag_retrieval.data.store import open_store
from rag_retrieval.mining.config import FUSED, RANDOM, MiningConfig, summary_file
from rag_retrieval.mining.miner import Miner, RandomSearch, device_of
from rag_retrieval.mining.output import Mined, MiningSummary, lines_of, text_writer
from rag_retrieval.mining.queries import Query, demand_labels_above_zero, read_queries
from rag_retrieval.models.representations import REPRESENTATIONS
from rag_retrieval.models.settings import ModelFiles, model_content, resolve_model_path
from rag_retrieval.retrieval.building import build_documents
from rag_retrieval.retrieval.candidates import Search
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.fusion import FUSION_FILE, FusedSearch, Fusion
from rag_retrieval.retrieval.index import Index, build_index
from rag_retrieval.retrieval.index_files import IndexState, fingerprint

PART, MINED_FILE = 256, "mined.jsonl"  # queries of a part, and its file
DOCUMENTS_FILE = "documents.jsonl"
WITHOUT_EFFECT = {"data", "corpus", "index", "split", "output", "output_format", "labels", "overwrite", "work_dir",
                  "device", *EngineOptions.model_fields}  # fmt: skip


def mine(config: MiningConfig) -> MiningSummary:
    """Write `config.output` and, beside it, the summary as NAME.summary.json. Returns the summary.

    Under `accelerate launch` or torchrun every process calls it, and has the same summary. Raises DataError for data
    that cannot be used, and ValueError for models, an output that exists, a work folder in use, and when no query got a
    negative. The output is then not written, and the work folder stays.
    """
    output = Path(config.output)
    work = WorkFolder(Path(config.work_dir or f"{output}.work").absolute())
    with process_group(), ExitStack() as locks:  # which the main process alone takes
        on_main(lambda: begin(config, output, work, locks))
        folder = build_source(config, work)
        made_from, queries = on_main(lambda: plan(config, folder))
        sizes = [min(PART, queries - start) for start in range(0, queries, PART)]
        shown = {"description": "mining", "unit": "queries"}
        shard_work = ShardWork("rag_retrieval.mining.run:open_miner", {"config": config, "folder": folder})
        parts = run_shards(work.path / f"parts-{digest_of(made_from)}", made_from, sizes, shard_work, config, **shown)
        summary = on_main(lambda: write_results(config, folder, parts))
        if config.work_dir is None:
            on_main(work.remove)
    return summary


def begin(config: MiningConfig, output: Path, work: WorkFolder, locks: ExitStack) -> None:
    """Take output and work folder, and check what can be checked without any work."""
    locks.enter_context(
        locked(lock_file_of(output), f"output: another run is writing {output}; wait for it, or choose another")
    )
    check_output(config, output)
    if not Path(config.data).exists():
        raise DataError(f"{config.data}: no such file or folder; the current folder is {Path.cwd()}.")
    locks.enter_context(work.locked())


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


def build_source(config: MiningConfig, work: WorkFolder) -> Path:
    """The folder of the index that is named, or of one built from the corpus; for random documents, of a corpus. All
    processes share the encoding."""
    if config.index is not None:
        return Path(config.index).absolute()
    source = on_main(lambda: corpus_of(config, work))
    if config.candidates == RANDOM:
        return on_main(lambda: build_documents(source, work.path, PASSAGE_TOKENS))
    options = index_options(config)
    made_from = on_main(lambda: [source_content(source), source.is_dir(), fingerprint(options), config.seed])
    folder = work.path / f"index-{digest_of(made_from)}"
    if on_main(lambda: IndexState.read(folder)) is None:
        build_index(source, folder, options, config)
    return folder


def open_source(config: MiningConfig, folder: Path) -> Source:
    """Of what `build_source` gave. Raises ValueError for candidates that the index does not have."""
    if config.index is None and config.candidates == RANDOM:
        documents = Corpus(folder)
        source = Source(documents, RandomSearch(len(documents), config.seed), documents.folder.name)
    else:
        index = Index(folder, device=device_of(config), trust_remote_code=config.trust_remote_code)
        file = folder / FUSION_FILE
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


def corpus_of(config: MiningConfig, work: WorkFolder) -> Path:
    """Without a corpus, the documents of the records, each text once."""
    if Path(config.data).is_dir():
        return find_file(Path(config.data), "corpus.jsonl").parent
    if config.corpus is not None:
        return Path(config.corpus)

    def write(folder: Path) -> None:
        store = open_store(config.data, group_by_query=True)
        texts = dict.fromkeys(text for number in range(store.num_groups) for text in store.group(number).documents)
        with (folder / DOCUMENTS_FILE).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    return work.stage("documents", content_of(Path(config.data)), write) / DOCUMENTS_FILE


def index_options(config: MiningConfig) -> IndexOptions:
    """Raises ValueError for a device that this machine lacks."""
    kind = config.candidates if config.candidates in REPRESENTATIONS else "dense"
    words = {"bm25": config.candidates in ("bm25", FUSED), "language": config.language}
    if config.candidates == "bm25":
        return IndexOptions(**words)
    prefixes = {"query": config.query_prefix, "document": config.document_prefix}
    dense = dense_options(config) if kind == "dense" else {}
    return IndexOptions(
        **words,
        **dense,
        representations=(kind,),
        embedder=config.dense_model,
        device=device_of(config),
        trust_remote_code=config.trust_remote_code,
        prompts={kind: prefix for kind, prefix in prefixes.items() if prefix is not None} or None,
        max_length=config.dense_max_len,
        batch_size=config.dense_batch_size,
        seed=config.seed,
    )


def dense_options(config: MiningConfig) -> dict[str, Any]:
    modules = ModelFiles(resolve_model_path(config.dense_model)).modules
    return {
        "normalize": config.similarity == "cosine" or "Normalize" in modules,  # others keep their length
        "vector_precision": config.vector_dtype,
        "faiss_index": config.faiss_index,
        "pooling": config.pooling,
    }


def plan(config: MiningConfig, folder: Path) -> tuple[dict[str, Any], int]:
    """What the parts depend on, and the number of queries."""
    source = open_source(config, folder)
    queries = read_queries(config.data, config.split, source.documents)
    if config.output_format != "pos_neg" and config.labels == "relevance":
        demand_labels_above_zero(queries)
    settings = config.model_dump(exclude=WITHOUT_EFFECT)
    for key in ("dense_model", "reranker", "guide"):
        settings[key] = settings[key] and model_content(settings[key])
    return {"source": source.made_from, "queries": queries.digest(), "part": PART} | settings, len(queries.queries)


def open_miner(config: MiningConfig, folder: Path) -> MakeShard:
    """Mines parts of `PART` queries: a line of the file for each."""
    device = own_device()
    if config.device is None and device.type == "cuda":
        config = config.model_copy(update={"device": str(device)})
    source = open_source(config, folder)
    queries = read_queries(config.data, config.split, source.documents).queries
    miner = Miner(config, source.documents, source.search)

    def make(number: int, folder: Path) -> Iterator[int]:
        with (folder / MINED_FILE).open("w") as file:
            for mined in miner.mine(queries[number * PART : (number + 1) * PART]):
                file.write(json.dumps(asdict(mined)) + "\n")
                yield 1

    return make


def all_mined(queries: list[Query], parts: list[Path]) -> Iterator[tuple[Query, Mined]]:
    """Raises ValueError for a part that is damaged."""
    for number, part in enumerate(parts):
        of_part = queries[number * PART : (number + 1) * PART]
        lines = (part / MINED_FILE).read_text().splitlines()
        try:
            mined = [Mined(**json.loads(line)) for line in lines]
            yield from zip(of_part, mined, strict=True)
        except (ValueError, TypeError):
            found = f"{part / MINED_FILE}: damaged, expected a line for each of {len(of_part)} queries"
            raise ValueError(f"{found}; delete {part}, and the same command mines that part again") from None


def write_results(config: MiningConfig, folder: Path, parts: list[Path]) -> MiningSummary:
    """Both files, each under another name until it is whole; the summary first."""
    source = open_source(config, folder)
    corpus, queries = source.documents, read_queries(config.data, config.split, source.documents)
    num_positives = sum(len(query.positives) for query in queries.queries)
    counts = (len(corpus), queries.read, queries.without_text, len(queries.queries), num_positives)
    summary = MiningSummary(*counts, words=source.search.words)
    with atomic_write(Path(config.output)) as temporary:
        with text_writer(temporary, compressed=config.output.endswith(".gz")) as file:
            for query, mined in all_mined(queries.queries, parts):
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
