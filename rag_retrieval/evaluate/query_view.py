"""The queries of an evaluation of retrievers on its page: a table of their measures, and what each stage finds.

The page holds them as JSON, which query_view.js and the script of the search page draw. Of each query it has what POST
/search answers with `stages`, once for each retriever: the first documents of every stage, the relevant ones, and where
both stand in the other stages. Texts are there once, and their beginnings alone; a query whose best passage of a
document stands further back has the surroundings of that passage. Seconds are those of a mean query.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_retrieval.evaluate.report import note
from rag_retrieval.evaluate.retrieval import RetrievalEvaluation
from rag_retrieval.metrics import is_relevant, trec_order
from rag_retrieval.retrieval import stage_view
from rag_retrieval.retrieval.best_passage import QueryWords, query_words
from rag_retrieval.retrieval.searched import ENCODE

SCRIPT = stage_view.SCRIPT + Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
MOST_QUERIES = 200
MOST_CHARACTERS = 8_000_000  # of the JSON; a query that begins before them is whole
LONGEST_TEXT = 1000  # characters of a document
AROUND = 300  # characters before and after a passage that stands further back
SHOWN = 10  # documents of a stage


def section(evaluation: RetrievalEvaluation) -> list[str]:
    """HTML, without the script."""
    view = query_view(evaluation)
    shown, measured = len(view["queries"]), len(evaluation.measured)
    lowest = f"lowest {evaluation.config.measures[0]} of {evaluation.after.name}"
    about = f"All {measured:,} queries, those with the {lowest} first."
    if shown < measured:
        about = f"Of {measured:,} queries the {shown:,} with the {lowest}; per_query.jsonl has the figures of all."
    about += (
        f" A query opens into the first {SHOWN} documents of each stage, and the relevant ones below, with the passage "
        "of each in which most of the query's words stand."
    )
    notes = note(about) + "".join(map(note, describe_seconds(evaluation.seconds)))
    return [
        f'<section class="queries" aria-labelledby="of-queries">\n<h2 id="of-queries">Queries</h2>\n{notes}',
        f'<script type="application/json" id="data">{stage_view.script_json(view)}</script>\n</section>',
    ]


def describe_seconds(seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """seconds: of `RetrievalEvaluation`. Nothing where no time is known."""
    if not any(seconds.values()):
        return []
    encoding = [f"{name} {1000 * own[ENCODE]:,.1f} ms" for name, own in seconds.items() if ENCODE in own]
    about = (
        "The time of a stage is a mean: an evaluation asks all queries together, and this is the stage's time, with "
        "what it loads for the first, divided by their number. A query by itself takes longer. What was computed "
        "before has no time."
    )
    return [about + (f" Encoding a query, before the stages: {', '.join(encoding)}." if encoding else "")]


def query_view(evaluation: RetrievalEvaluation) -> dict[str, Any]:
    """What the script reads: names and numbers of the rows, queries (those of the lowest first measure of the last row
    first), seconds by retriever and stage, and documents by id."""
    systems = evaluation.systems
    view: dict[str, Any] = {
        "measures": list(evaluation.config.measures),
        "systems": [system.name for system in systems],
        "before": systems.index(evaluation.before),
        "after": systems.index(evaluation.after),
        "shown": SHOWN,
        "seconds": evaluation.seconds,
        "queries": [],
        "documents": {},
    }
    values = evaluation.after.per_query[evaluation.config.measures[0]]
    characters = 0
    for query in sorted(evaluation.measured, key=values.__getitem__)[:MOST_QUERIES]:
        if characters > MOST_CHARACTERS:
            break
        one = view_of_query(evaluation, query)
        found = {id_: text for id_ in sorted(ids_of(one)) if (text := evaluation.data.documents.get(id_)) is not None}
        words = evaluation.words.get(query) or query_words(one["query"], None)
        one["documents"] = passages_of(words, found)
        elsewhere = view["documents"].keys() | {id_ for id_, own in one["documents"].items() if "text" in own}
        new = {id_: part_of(text, 0, LONGEST_TEXT) for id_, text in found.items() if id_ not in elsewhere}
        view["queries"].append(one)
        view["documents"] |= new
        characters += len(json.dumps([one, new], ensure_ascii=False))
    return view


def view_of_query(evaluation: RetrievalEvaluation, query: str) -> dict[str, Any]:
    systems, grades = evaluation.systems, evaluation.data.qrels[query]
    relevant = {id_ for id_, grade in grades.items() if is_relevant(grade, evaluation.config.relevant_from)}
    shown = relevant | {id_ for system in systems for id_ in trec_order(system.run.get(query, {}))[:SHOWN]}
    return {
        "id": query,
        "query": evaluation.data.queries[query],
        "values": {name: [system.per_query[name][query] for system in systems] for name in evaluation.config.measures},
        "judged": [
            {
                "id": id_,
                "grade": grade,
                "relevant": id_ in relevant,
                "absent": [retriever for retriever, absent in evaluation.absent.items() if id_ in absent],
            }
            for id_, grade in sorted(grades.items(), key=lambda item: -item[1])
            if id_ in shown
        ],
        "answers": [
            {"name": name, "stages": [stage_of(stage, of.run.get(query, {}), shown) for stage, of in stages.items()]}
            for name, stages in evaluation.stages.items()
        ],
    }


def stage_of(name: str, scores: dict[str, float], shown: set[str]) -> dict[str, Any]:
    ranked = enumerate(trec_order(scores), start=1)
    hits = [{"id": id_, "score": float(scores[id_]), "rank": rank} for rank, id_ in ranked if id_ in shown]
    return {"name": name, "results": hits, "found": len(scores)}


def ids_of(query: dict[str, Any]) -> set[str]:
    """The documents that stand in a query's stages, and the relevant ones."""
    stages = [stage for answer in query["answers"] for stage in answer["stages"]]
    return {hit["id"] for stage in stages for hit in stage["results"]} | {judged["id"] for judged in query["judged"]}


def passages_of(words: QueryWords, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of the documents that have a best passage: its place in the whole text and, where it ends behind the beginning
    that all queries share, the text around it."""
    documents = {}
    for id_, text in texts.items():
        best = words.best_passage(text)
        if best is None:
            continue
        start, end = best
        around = part_of(text, max(0, start - AROUND), end + AROUND) if end > LONGEST_TEXT else {}
        documents[id_] = {"passage": {"start": start, "end": end}} | around
    return documents


def part_of(text: str, start: int, end: int) -> dict[str, Any]:
    """As a document. Where it is not the whole text: its place, and the characters of the whole; in words too, in the
    metadata."""
    part = text[start:end]
    if part == text:
        return {"text": text, "metadata": {}}
    place = f"characters {start:,} to {start + len(part):,} of {len(text):,}"
    return {"text": part, "metadata": {"text": place}, "begin": start, "characters": len(text)}
