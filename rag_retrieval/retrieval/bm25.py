"""BM25: over texts in memory, and as an index that is built within bounded memory, with a search over it.

`build_bm25` writes what `bm25s.BM25.save` would, and bm25s maps and searches it. bm25s's own `index` holds every word
of the corpus as a Python object and sorts all postings at once: 4.5 GiB for 1,000,000 documents of 100 words, where
this builder takes 0.6 GiB. Words go to disk as they are counted, and scores are put in their place block by block.

A document that shares no word with the query is not found, so a list may be short, or empty. A pool is ranked whole.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import Pool, Run
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.records import DataError
from rag_retrieval.data.words import AUTO, describe_words, tokenize
from rag_retrieval.retrieval.candidates import Candidates, best_rows

BM25 = "bm25"  # what a configuration calls these candidates
K1, B = 1.2, 0.75
DOCUMENTS = 2000  # tokenized and counted at once
POSTINGS = 1 << 22  # scored and placed at once
POSTING = np.dtype([("document", "i4"), ("word", "i4"), ("count", "i4")])


def build_bm25(corpus: Corpus, folder: Path, language: str = AUTO) -> None:
    """Write the index into the existing folder. Raises DataError where no document has a word.

    language: see `words.tokenize`.
    """
    vocabulary, lengths = _count_words(corpus, folder / "postings", language)
    if not vocabulary:
        raise DataError("no document of the corpus has a word that BM25 could count; look at its texts.")
    _place_scores(folder, lengths, len(vocabulary))
    (folder / "postings").unlink()
    (folder / "vocab.index.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    settings = {"k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32"}
    settings |= {"int_dtype": "int32", "num_docs": len(corpus), "backend": "numpy"}
    (folder / "params.index.json").write_text(json.dumps(settings))
    (folder / "language").write_text(language)
    (folder / "words").write_text(describe_words(vocabulary, language))


def _count_words(corpus: Corpus, postings: Path, language: str) -> tuple[dict[str, int], np.ndarray]:
    """(number of each word, words of each document); how often each word is where goes to the postings file."""
    vocabulary: dict[str, int] = {}
    lengths = np.zeros(len(corpus), np.int64)
    row = 0
    with postings.open("wb") as file, Progress(len(corpus), "counting words", "documents") as progress:
        for texts in corpus.blocks(DOCUMENTS):
            words = tokenize(texts, language)
            numbers = np.array([vocabulary.setdefault(w, len(vocabulary)) for text in words for w in text], np.int64)
            sizes = np.array([len(text) for text in words])
            lengths[row : row + len(texts)] = sizes
            rows = np.repeat(np.arange(row, row + len(texts)), sizes)
            keys, counts = np.unique(rows << 32 | numbers, return_counts=True)
            block = np.empty(len(keys), POSTING)
            block["document"], block["word"], block["count"] = keys >> 32, keys & 0xFFFFFFFF, counts
            block.tofile(file)
            row += len(texts)
            progress.update(len(texts))
    return vocabulary, lengths


def _place_scores(folder: Path, lengths: np.ndarray, num_words: int) -> None:
    """Turn postings in document order into bm25s's columns: scores by word, and by document within a word.

    The score of a word in a document is Lucene's: ln(1 + (N - n + 0.5) / (n + 0.5)) f / (f + k1 (1 - b + b l / L)),
    with N documents, n of them with the word, f occurrences in this one of l words, and L words on average.
    """
    sizes = np.zeros(num_words, np.int64)
    for block in _blocks(folder / "postings"):
        np.add.at(sizes, block["word"], 1)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    np.save(folder / "indptr.csc.index.npy", ends)
    weights = _idf(sizes, len(lengths)).astype(np.float32)
    norms = K1 * (1 - B + B * lengths / lengths.mean())
    columns = {
        name: _mapped_column(folder / f"{name}.csc.index.npy", dtype, int(ends[-1]))
        for name, dtype in (("data", np.float32), ("indices", np.int32))
    }
    free = ends[:-1].copy()  # where the next posting of each word goes
    with Progress(int(ends[-1]), "indexing words", "postings") as progress:
        for block in _blocks(folder / "postings"):
            block = block[np.argsort(block["word"], kind="stable")]
            words, first, counts = np.unique(block["word"], return_index=True, return_counts=True)
            places = np.repeat(free[words] - first, counts) + np.arange(len(block))
            scores = block["count"] / (block["count"] + norms[block["document"]]) * weights[block["word"]]
            columns["data"][places] = scores
            columns["indices"][places] = block["document"]
            free[words] += counts
            progress.update(len(block))
    for column in columns.values():
        column.flush()


def _idf(num_with: np.ndarray, num_documents: int) -> np.ndarray:
    """float64, of words that so many documents have."""
    return np.log1p((num_documents - num_with + 0.5) / (num_with + 0.5))


def _mapped_column(file: Path, dtype: type, count: int) -> np.ndarray:
    """Its room on the disk is taken first: writing to a map on a full disk would end the process by SIGBUS."""
    column = np.lib.format.open_memmap(file, "w+", dtype, (count,))
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return column


def _blocks(postings: Path):
    with postings.open("rb") as file:
        while len(block := np.fromfile(file, POSTING, POSTINGS)):
            yield block


class Bm25Search:
    """A search over a built index. Its columns are mapped, its vocabulary is in memory."""

    def __init__(self, folder: Path):
        import bm25s

        self.index = bm25s.BM25.load(folder, mmap=True)
        self.language, self.words = ((folder / name).read_text() for name in ("language", "words"))

    def weights(self, query: str) -> dict[str, float]:
        """The idf of each different word of a query that some document has."""
        numbers = self.index.vocab_dict
        words = [word for word in dict.fromkeys(tokenize([query], self.language)[0]) if word in numbers]
        starts, places = self.index.scores["indptr"], np.array([numbers[word] for word in words], np.int64)
        weights = _idf(starts[places + 1] - starts[places], self.index.scores["num_docs"])
        return dict(zip(words, weights.tolist(), strict=True))

    def search(
        self,
        queries: Sequence[str],
        judged: Sequence[np.ndarray],
        depth: int,
        among: np.ndarray | None = None,
    ) -> list[Candidates]:
        """among: int64 rows, rising, that may be found; None for all. Scores are those without it."""
        found = []
        for words, rows_judged in zip(tokenize(queries, self.language), judged, strict=True):
            if not words:
                found.append(Candidates.none(len(rows_judged)))
                continue
            scores = self.index.get_scores(words)
            rows = best_rows(scores, depth, among)
            found.append(Candidates(rows, scores[rows], scores[rows_judged]))
        return found


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
