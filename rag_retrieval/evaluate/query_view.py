"""The queries of an evaluation of retrievers on its page: a table of their measures, and what each stage finds.

The page holds them as JSON, which query_view.js and the script of the search page draw. Of each query it has what POST
/search answers with `stages`, once for each retriever: the first documents of every stage, the relevant ones, and where
both stand in the other stages. Texts are there once, and their beginnings alone.
"""

import json
from pathlib import Path
from typing import Any

from rag_retrieval.evaluate.report import note
from rag_retrieval.evaluate.retrieval import RetrievalEvaluation
from rag_retrieval.metrics import is_relevant, trec_order
from rag_retrieval.retrieval import stage_view

SCRIPT = stage_view.SCRIPT + Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
MOST_QUERIES = 200
MOST_CHARACTERS = 8_000_000  # of the JSON; a query that begins before them is whole
LONGEST_TEXT = 1000  # characters of a document
SHOWN = 10  # documents of a stage


def section(evaluation: RetrievalEvaluation) -> list[str]:
    """HTML, without the script."""
    view = query_view(evaluation)
    shown, measured = len(view["queries"]), len(evaluation.measured)
    lowest = f"lowest {evaluation.config.measures[0]} of {evaluation.after.name}"
    about = f"All {measured:,} queries, those with the {lowest} first."
    if shown < measured:
        about = f"Of {measured:,} queries the {shown:,} with the {lowest}; per_query.jsonl has the figures of all."
    about += f" A query opens into the first {SHOWN} documents of each stage, and the relevant ones below."
    return [
        f'<section class="queries" aria-labelledby="of-queries">\n<h2 id="of-queries">Queries</h2>\n{note(about)}',
        f'<script type="application/json" id="data">{stage_view.script_json(view)}</script>\n</section>',
    ]


def query_view(evaluation: RetrievalEvaluation) -> dict[str, Any]:
    """What the script reads: names and numbers of the rows, queries (those of the lowest first measure of the last row
    first), and documents by id."""
    systems = evaluation.systems
    view: dict[str, Any] = {
        "measures": list(evaluation.config.measures),
        "systems": [system.name for system in systems],
        "before": systems.index(evaluation.before),
        "after": systems.index(evaluation.after),
        "shown": SHOWN,
        "queries": [],
        "documents": {},
    }
    values = evaluation.after.per_query[evaluation.config.measures[0]]
    characters = 0
    for query in sorted(evaluation.measured, key=values.__getitem__)[:MOST_QUERIES]:
        if characters > MOST_CHARACTERS:
            break
        one = view_of_query(evaluation, query)
        texts = {id_: evaluation.data.documents.get(id_) for id_ in ids_of(one) - view["documents"].keys()}
        new = {id_: document_of(text) for id_, text in texts.items() if text is not None}
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


def document_of(text: str) -> dict[str, Any]:
    """The beginning of its text; that it is one stands in the metadata."""
    cut = {"text": f"the first {LONGEST_TEXT:,} of {len(text):,} characters"} if len(text) > LONGEST_TEXT else {}
    return {"text": text[:LONGEST_TEXT], "metadata": cut}
