"""Scores of all candidates of all queries, kept as they come: a run that is cut off loses one part at most.

    run.trec            the finished run
    run.trec.key        what was scored by what; the run is taken again only where this is the same
    run.trec.parts/     while it is unfinished: a run file for each part, and the key

The trap: the key holds the weights and every text, not names and times. A model trained anew in the same folder,
or a changed corpus, is scored anew.
"""

import hashlib
import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rag_retrieval.core.distributed import on_main, process_index
from rag_retrieval.core.progress import Progress
from rag_retrieval.data.beir import Run, read_run, write_run
from rag_retrieval.data.records import DataError
from rag_retrieval.evaluate.ranking_data import RankingData
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.process_scoring import score_over_processes
from rag_retrieval.models.scoring_mode import Precision

logger = logging.getLogger(__name__)

PART_PAIRS = {"cpu": 1024, "cuda": 16_384}  # of a part, about: whole queries


@dataclass(frozen=True)
class HowToScore:
    """batch_size: pairs of one forward at most. precision: of the autocast, None for the device's own choice."""

    batch_size: int = 256
    precision: Precision | None = None


def score_candidates(scorer: PairScorer, name: str, data: RankingData, file: Path, how: HowToScore) -> Run:
    """The candidates with the scorer's scores; `file` is written, or read where it is finished already.

    Every process of a group calls it with the same arguments, and each has the whole result. name: of the system,
    in the file. Raises ValueError where a score is not finite.
    """
    key = on_main(lambda: key_of(scorer, data, how))
    finished = on_main(lambda: read_finished(file, key, data))
    if finished is not None:
        return in_order_of(data, finished)
    folder = file.with_name(file.name + ".parts")
    parts = plan_parts(data, PART_PAIRS[scorer.device.type])
    done = on_main(lambda: begin(folder, key))
    finished_pairs = sum(pairs_in(data, parts[place]) for place in done if place < len(parts))
    with Progress(data.num_pairs, "scoring", "pairs", finished_pairs, shown=process_index() == 0) as progress:
        for place, queries in enumerate(parts):
            if place not in done:
                score_part(scorer, name, data, queries, folder / part_name(place), how)
                progress.update(pairs_in(data, queries))
    return on_main(lambda: finish(file, folder, key, name, data, len(parts)))


def score_part(
    scorer: PairScorer, name: str, data: RankingData, queries: list[str], file: Path, how: HowToScore
) -> None:
    places = [(query, document) for query in queries for document in data.candidates[query]]
    pairs = [(data.queries[query], data.documents[document]) for query, document in places]
    scores = score_over_processes(scorer, pairs, how.batch_size, precision=how.precision).tolist()
    run: Run = {query: {} for query in queries}
    for (query, document), score in zip(places, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"{name}: the score of query {query!r} with document {document!r} is {score}.")
        run[query][document] = score
    on_main(lambda: write_run(file, run, name))


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


# ---- files ----------------------------------------------------------------------------------------------


def key_of(scorer: PairScorer, data: RankingData, how: HowToScore) -> str:
    """A digest of all that decides on the scores and on the parts: weights, settings, texts, precision, device."""
    digest = hashlib.sha256()
    device = scorer.device.type
    about = [asdict(scorer.settings), scorer.pair_encoder.max_length, how.precision, device, PART_PAIRS[device]]
    digest.update(json.dumps(about).encode())
    for name, values in sorted(scorer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
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
        logger.warning("%s: changed since it was written; scoring anew", file)
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
        logger.info("%s: %d parts were scored before; going on", folder, len(done))
    return done


def part_name(place: int) -> str:
    return f"part-{place:06d}.trec"


def finish(file: Path, folder: Path, key: str, name: str, data: RankingData, parts: int) -> Run:
    """One run file of all parts, in the order of the data. The old key goes first and the new one comes last, so
    that a file never stands under another's key."""
    found: Run = {}
    for place in range(parts):
        found |= read_run(folder / part_name(place))
    run, key_file = in_order_of(data, found), file.with_name(file.name + ".key")
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
