"""Scores of all candidates of all queries, written as they come: a run that is cut off loses one part at most.

    run.trec            the finished run
    run.trec.key        what was scored by what; the run is taken again only where this is the same
    run.trec.parts/     while it is unfinished: a run file for each part, and the key
    .lock               held by the evaluation that writes here

The key is a digest of weights and texts, not of names and times: a model retrained in the same folder, or a changed
corpus, is scored again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from rag_retrieval.core.distributed import gather, on_all, on_main, process_count, process_index
from rag_retrieval.core.files import locked
from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import Run, read_run, write_run
from rag_retrieval.data.records import DataError
from rag_retrieval.evaluate.config import EvaluationConfig
from rag_retrieval.evaluate.ranking_data import RankingData
from rag_retrieval.infer.listwise import ListwiseReranker
from rag_retrieval.infer.reranker import Reranker

logger = logging.getLogger(__name__)

PART_PAIRS = {"cpu": 1024, "cuda": 16_384}  # of a part, about: whole queries
RESULT_FILE = "result.json"
AnyReranker = Reranker | ListwiseReranker
# of the configuration: a folder holds results of one value of each
IDENTITY_KEYS = ("model", "retriever", "query_model", "reranker", "data", "split")


class Scored(NamedTuple):
    """seconds: a query, mean of those that were scored now; None where all were scored before."""

    run: Run
    seconds: float | None


def score_candidates(
    reranker: AnyReranker, name: str, data: RankingData, file: Path, config: EvaluationConfig
) -> Scored:
    """The candidates with the reranker's scores; `file` is written, or read where it is finished already.

    Every process of a group calls it with the same arguments, and each has the whole result. name: of the system,
    in the file. Raises ValueError where a score is not finite.
    """
    key = on_main(lambda: key_of(reranker, data, config))
    finished = on_main(lambda: read_finished(file, key, data))
    if finished is not None:
        return Scored(in_order_of(data, finished), None)
    folder = file.with_name(file.name + ".parts")
    parts = plan_parts(data, PART_PAIRS["cpu" if device_of(reranker) == "cpu" else "cuda"])
    done = on_main(lambda: begin(folder, key))
    finished_pairs = sum(pairs_in(data, parts[place]) for place in done if place < len(parts))
    start, scored = perf_counter(), 0
    with Progress(data.num_pairs, "scoring", "pairs", finished_pairs, shown=process_index() == 0) as progress:
        for place, queries in enumerate(parts):
            if place not in done:
                score_part(reranker, name, data, queries, folder / part_name(place), config)
                progress.update(pairs_in(data, queries))
                scored += len(queries)
    seconds = (perf_counter() - start) / scored if scored else None
    return Scored(on_main(lambda: finish(file, folder, key, name, data, len(parts))), seconds)


def score_part(
    reranker: AnyReranker, name: str, data: RankingData, queries: list[str], file: Path, config: EvaluationConfig
) -> None:
    """The processes share the queries."""
    own = queries[process_index() :: process_count()]
    shares = gather(on_all(lambda: score_queries(reranker, name, data, own, config)))
    run = {query: scores for share in shares for query, scores in share.items()}
    on_main(lambda: write_run(file, {query: run[query] for query in queries}, name))


def score_queries(
    reranker: AnyReranker, name: str, data: RankingData, queries: list[str], config: EvaluationConfig
) -> Run:
    if isinstance(reranker, ListwiseReranker):
        return order_queries(reranker, name, data, queries)
    places = [(query, document) for query in queries for document in data.candidates[query]]
    pairs = [(data.queries[query], data.documents[document]) for query, document in places]
    try:
        scores = reranker.compute_score(
            pairs, config.batch_size, long_document=config.long_document, overlap=config.overlap
        ).tolist()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    run: Run = {query: {} for query in queries}
    for (query, document), score in zip(places, scores, strict=True):
        run[query][document] = score
    return run


def order_queries(reranker: ListwiseReranker, name: str, data: RankingData, queries: list[str]) -> Run:
    """1 / rank of each candidate; windows begin with the candidates' own order."""
    run: Run = {}
    windows = invalid = 0
    for query in queries:
        documents = [{"id": document, "text": data.documents[document]} for document in data.candidates[query]]
        try:
            results = reranker.rerank(data.queries[query], documents)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        run[query] = {result.doc_id: result.score for result in results}
        windows, invalid = windows + results.windows, invalid + results.invalid_answers
    if invalid:
        logger.warning("%s: %d of %d answers did not name each document of their window once", name, invalid, windows)
    return run


def device_of(reranker: AnyReranker) -> str:
    return reranker.device if isinstance(reranker, ListwiseReranker) else reranker.backend.device


def plan_parts(data: RankingData, part_pairs: int) -> list[list[str]]:
    """Queries with candidates in parts of at least `part_pairs` pairs, but for the last."""
    parts: list[list[str]] = [[]]
    for query, documents in data.candidates.items():
        if pairs_in(data, parts[-1]) >= part_pairs:
            parts.append([])
        if documents:
            parts[-1].append(query)
    return [part for part in parts if part]


def pairs_in(data: RankingData, queries: list[str]) -> int:
    return sum(len(data.candidates[query]) for query in queries)


# ---- files of one run -------------------------------------------------------------------------------------


def key_of(reranker: AnyReranker, data: RankingData, config: EvaluationConfig) -> str:
    """A digest of all that decides on the scores and on the parts: weights, settings, texts, precision, device."""
    if isinstance(reranker, ListwiseReranker):
        about = [reranker.fingerprint(), PART_PAIRS]
    else:
        about = [reranker.backend.fingerprint(), config.long_document, config.overlap, PART_PAIRS]
    digest = hashlib.sha256(json.dumps(about).encode())
    for query, documents in data.candidates.items():
        for text in (query, data.queries[query], *documents, *(data.documents[each] for each in documents)):
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def read_finished(file: Path, key: str, data: RankingData) -> Run | None:
    """The run in the file, where it is finished and whole; None where it has to be scored."""
    key_file = file.with_name(file.name + ".key")
    if not (file.is_file() and key_file.is_file() and key_file.read_text() == key):
        return None
    try:
        run = read_run(file)
    except DataError:
        run = {}
    if any(documents.keys() != run.get(query, {}).keys() for query, documents in data.candidates.items()):
        logger.warning("%s: changed since it was written; scoring again", file)
        return None
    logger.info("%s: scored before, taken from there", file)
    return run


def begin(folder: Path, key: str) -> set[int]:
    """The places of the parts that are done; parts of other scores are removed."""
    key_file = folder / "key"
    if not (key_file.is_file() and key_file.read_text() == key):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        key_file.write_text(key)
    done = {int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.trec")}
    if done:
        logger.info("%s: %d parts were scored before; continuing", folder, len(done))
    return done


def part_name(place: int) -> str:
    return f"part-{place:06d}.trec"


def finish(file: Path, folder: Path, key: str, name: str, data: RankingData, parts: int) -> Run:
    """One run file of all parts, in the order of the data. The old key goes first and the new one comes last, so
    that a file never stands under another's key."""
    scored: Run = {}
    for place in range(parts):
        scored |= read_run(folder / part_name(place))
    run, key_file = in_order_of(data, scored), file.with_name(file.name + ".key")
    key_file.unlink(missing_ok=True)
    write_run(file, run, name)
    key_file.write_text(key)
    shutil.rmtree(folder)
    return run


def in_order_of(data: RankingData, run: Run) -> Run:
    """Queries and documents in the order of the candidates, with the scores of `run`."""
    return {
        query: {document: run[query][document] for document in documents}
        for query, documents in data.candidates.items()
    }


# ---- the folder ------------------------------------------------------------------------------------------


@contextmanager
def locked_output_dir(folder: Path, config: dict) -> Iterator[None]:
    """The folder, made where it is missing, for this evaluation alone. Every process of a launch calls it.

    config: of the evaluation, as JSON values. Raises ValueError for a place where no folder can be, for one in which
    another evaluation runs, and for one that has the results of another model or other data. Its own earlier results
    are written over.
    """
    with ExitStack() as lock:  # which the main process alone takes
        on_main(lambda: _take(folder, config, lock))
        yield


def _take(folder: Path, config: dict, lock: ExitStack) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {existing} is a file; give a folder")
    busy = f"output_dir: another evaluation writes to {folder}; wait for it, or give another output_dir"
    lock.enter_context(locked(folder / ".lock", busy))
    try:
        before = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))["config"]
        other = [
            f"{key} {', '.join(names_in(before[key]))}"
            for key in IDENTITY_KEYS
            if before.get(key) and places_in(before[key]) != places_in(config.get(key))
        ]
    except (OSError, ValueError, KeyError, TypeError):  # no results there that can be read
        other = []
    if other:
        raise ValueError(
            f"output_dir: {folder} has the results of {', '.join(other)}; give another output_dir, or remove it"
        )


def names_in(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def places_in(value: str | list[str] | None) -> list[Path]:
    """From Python a path may be relative, where the command's was absolute."""
    return [Path(name).resolve() for name in names_in(value)]
