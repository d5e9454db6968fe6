"""Records with a teacher's scores as lines of a training file: pointwise records stay so, all others become hits.

    {"query": "q", "content": "d", "label": 1, "teacher_score": 6.25, "teacher_probability": 0.99807}
    {"query": "q", "hits": [{"content": "d", "label": 1, "teacher_score": 6.25, "teacher_probability": 0.99807}, ...]}

The trap: numbers are written as the shortest text that gives the same float32, so that a file read back has the
scores to the last bit and not a digit more.
"""

import json
from collections.abc import Sequence

import numpy as np

from rag_retrieval.data.records import Record


def scored_line(record: Record, scores: Sequence[float]) -> str:
    """One JSON line, with its line break. scores: of the record's documents, float32."""
    documents = [
        {"content": document, "label": shortest(label)} | taught(score)
        for document, label, score in zip(record.documents, record.labels, scores, strict=True)
    ]
    if record.format == "pointwise":
        values = {"query": record.query} | documents[0]
    else:
        values = {"query": record.query, "hits": documents}
    return json.dumps(values, ensure_ascii=False) + "\n"


def taught(score: float) -> dict[str, float]:
    probability = 1 / (1 + np.exp(-np.float64(score)))
    return {"teacher_score": float(str(np.float32(score))), "teacher_probability": float(str(np.float32(probability)))}


def shortest(label: float) -> int | float:
    """1 for 1.0, 0.3 for the float32 that is nearest to it."""
    return int(label) if label.is_integer() else float(str(np.float32(label)))
