"""Runs as files: what a system ranked for each query, with its scores.

    query Q0 document rank score name     TREC, columns between spaces or tabs
    query document score                  three columns between tabs

Both may be gzipped. The trap: the rank column is not read. As in trec_eval, the scores alone give the order.
"""

import math
from pathlib import Path

import numpy as np

from rag_retrieval.core.files import replacing
from rag_retrieval.data.beir_folder import Run
from rag_retrieval.data.json_lines import byte_lines, decoded
from rag_retrieval.data.records import DataError


def read_run(path: str | Path) -> Run:
    """Scores by query and document. Raises DataError with file and line for a line that is neither format, a
    score that is no finite number, or a document twice for one query."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}; expected a TREC run file.")
    run: Run = {}
    for line, raw in byte_lines(path):
        fields = decoded(raw, f"{path}:{line}").split()
        if not fields or (line == 1 and fields[0] == "query-id"):
            continue
        query, document, score = _columns(fields, path, line)
        documents = run.setdefault(query, {})
        if document in documents:
            raise DataError(f"{path}:{line}: document {document!r} stands twice for query {query!r}; keep one.")
        documents[document] = _score(score, path, line)
    if not run:
        raise DataError(f"{path}: found no line of a run; expected query, Q0, document, rank, score, name.")
    return run


def _columns(fields: list[str], path: Path, line: int) -> tuple[str, str, str]:
    if len(fields) == 6:
        return fields[0], fields[2], fields[4]
    if len(fields) == 3:
        return fields[0], fields[1], fields[2]
    expected = "expected six (query Q0 document rank score name) or three (query document score)"
    raise DataError(f"{path}:{line}: found {len(fields)} columns; {expected}.")


def _score(text: str, path: Path, line: int) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{path}:{line}: the score is {text!r}; expected a finite number.")
    return score


def write_run(path: Path, run: Run, name: str) -> None:
    """A TREC run file, whole or not at all. Scores keep every digit.

    name: of the system, for the last column; its spaces become underscores. Documents stand by falling score and
    those of equal score as trec_eval takes them (`trec_order`), so that the ranks are those that are measured.
    """
    label = "_".join(name.split()) or "run"
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        for query, scores in run.items():
            for rank, document in enumerate(trec_order(scores), start=1):
                file.write(f"{query} Q0 {document} {rank} {scores[document]!r} {label}\n")


def trec_order(scores: dict[str, float]) -> list[str]:
    """Documents in the order in which trec_eval ranks them: score falling, then id falling, as texts.

    trec_eval keeps scores in float32, so scores that differ only beyond it are equal here too.
    """
    return sorted(scores, key=lambda document: (np.float32(scores[document]), document.encode()), reverse=True)
