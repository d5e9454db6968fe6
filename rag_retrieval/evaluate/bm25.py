"""BM25 over texts in memory, through bm25s.

A query that shares no word with any document has no candidates, but for a pool, which is ranked whole.
"""

import logging

import numpy as np

from rag_retrieval.data.beir import Pool, Run
from rag_retrieval.data.words import AUTO, describe_words, tokenize

K1, B = 1.2, 0.75
BM25 = "bm25"  # what a configuration calls these candidates


def bm25_run(
    documents: dict[str, str], queries: dict[str, str], pool: Pool | None, depth: int, language: str = AUTO
) -> tuple[Run, str]:
    """The best `depth` documents of each query, the best first; equal scores in the order of `documents`.

    Without a pool only documents that share a word with the query; with one, its documents and no others. language: see
    `words.tokenize`. Returns also how the words of the documents were made (`words.describe_words`).
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG
    words = tokenize(list(documents.values()), language)
    index = bm25s.BM25(k1=K1, b=B)
    has_words = any(words)
    if has_words:  # else bm25s fails, and nothing is found anyway
        index.index(words, show_progress=False)
    ids = np.array(list(documents))
    row = {document: place for place, document in enumerate(documents)} if pool is not None else {}
    run = {}
    for query, tokens in zip(queries, tokenize(list(queries.values()), language), strict=True):
        scores = index.get_scores(tokens) if tokens and has_words else np.zeros(len(ids))
        if pool is None:
            kept = np.flatnonzero(scores > 0)
        else:
            kept = np.array(sorted(row[document] for document in pool.get(query, ())), dtype=int)
        kept = kept[np.argsort(-scores[kept], kind="stable")[:depth]]
        run[query] = dict(zip(ids[kept].tolist(), scores[kept].tolist(), strict=True))
    return run, describe_words({word for text in words for word in text}, language)
