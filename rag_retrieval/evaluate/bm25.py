"""BM25 over texts, English by stems and Chinese by words, through bm25s.

What a reader would get wrong: the language is read off the documents, not the queries, and one corpus is cut
in one way. A query that shares no word with any document has no candidates, but for a pool, which is ranked
whole.
"""

import logging
from collections.abc import Iterable

import numpy as np

from rag_retrieval.evaluate.beir_folder import Pool, Run

K1, B = 1.2, 0.75
CHINESE_SHARE = 0.2  # of characters that are Han, from which on a corpus is cut as Chinese


def bm25_run(documents: dict[str, str], queries: dict[str, str], pool: Pool | None, depth: int) -> Run:
    """The best `depth` documents of each query, the best first; equal scores in the order of `documents`.

    Without a pool only documents that share a word with the query; with one, its documents and no others.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG
    words = chinese_words if is_chinese(documents.values()) else english_words
    index = bm25s.BM25(k1=K1, b=B)
    index.index(words(list(documents.values())), show_progress=False)
    ids = np.array(list(documents))
    row = {document: place for place, document in enumerate(documents)} if pool is not None else {}
    run = {}
    for query, tokens in zip(queries, words(list(queries.values())), strict=True):
        scores = index.get_scores(tokens) if tokens else np.zeros(len(ids))
        if pool is None:
            kept = np.flatnonzero(scores > 0)
        else:
            kept = np.array(sorted(row[document] for document in pool.get(query, ())), dtype=int)
        kept = kept[np.argsort(-scores[kept], kind="stable")[:depth]]
        run[query] = dict(zip(ids[kept].tolist(), scores[kept].tolist(), strict=True))
    return run


def is_chinese(texts: Iterable[str], sample: int = 200) -> bool:
    """Whether a good part of the first `sample` texts is Han characters."""
    beginning = "".join(text for _, text in zip(range(sample), texts, strict=False))
    han = sum("\u4e00" <= character <= "\u9fff" for character in beginning)
    return han > CHINESE_SHARE * len(beginning)


def english_words(texts: list[str]) -> list[list[str]]:
    """Stems in lower case without stop words."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def chinese_words(texts: list[str]) -> list[list[str]]:
    import jieba

    jieba.setLogLevel("WARNING")
    return [[word for word in jieba.cut(text.lower()) if word.strip()] for text in texts]
