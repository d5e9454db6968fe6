"""What becomes of documents that are too long: nDCG@10 of each `long_document`, at several maximum lengths.

    python benchmarks/long_documents.py --data DIR --model DIR

Reranks BM25's best documents of some test queries of a folder in BEIR layout. Equal pairs of tokens are scored once
for all rows, so that rows differ by what is read and by nothing else.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from rag_retrieval import Reranker
from rag_retrieval.evaluate.ranking_data import BM25, read_ranking_data
from rag_retrieval.metrics import run_metrics
from rag_retrieval.models.options import LONG_DOCUMENT

METRIC = "ndcg@10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in BEIR layout")
    parser.add_argument("--model", required=True, help="folder of a trained reranker")
    parser.add_argument("--candidates", default=BM25, help="bm25, or a run file")
    parser.add_argument("--queries", type=int, default=100, help="test queries, the first of the qrels")
    parser.add_argument("--depth", type=int, default=15, help="candidates of a query")
    parser.add_argument("--max_lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens of a pair")
    options = parser.parse_args()
    data = read_ranking_data(options.data, "test", options.candidates, options.depth)
    qrels = dict(list(data.qrels.items())[: options.queries])
    run = {query: data.candidates[query] for query in qrels}
    places = [(query, document) for query in run for document in run[query]]
    pairs = [(data.queries[query], data.documents[document]) for query, document in places]
    print(f"{len(qrels)} queries, {len(pairs)} pairs; {data.source}: {shown(qrels, run)}", flush=True)
    reranker = Reranker(options.model, max_length=max(options.max_lengths))
    known: dict[bytes, float] = {}
    for max_length in options.max_lengths:
        for long_document in LONG_DOCUMENT:
            started = time.perf_counter()
            scores, tokens = score(reranker, pairs, max_length, long_document, known)
            ranked = {query: {} for query in run}
            for (query, document), value in zip(places, scores, strict=True):
                ranked[query][document] = value
            seconds = time.perf_counter() - started
            print(f"{max_length:>5} {long_document:<12} {shown(qrels, ranked)} {tokens:>9,} tokens {seconds:>5.0f} s",
                  flush=True)  # fmt: skip


def score(reranker: Reranker, pairs, max_length: int, long_document: str, known: dict) -> tuple[list[float], int]:
    """Scores of the pairs, and the tokens that they stand for. known: scores of token ids, and is added to."""
    encoder = reranker.passage_encoder(max_length, long_document)
    documents = encoder.encode(pairs)
    new = {pair.ids.tobytes(): pair for document in documents for pair in document.pairs}
    new = {ids: pair for ids, pair in new.items() if ids not in known}
    known.update(zip(new, reranker.backend.score(list(new.values()), 256).tolist(), strict=True))
    all_pairs = [pair for document in documents for pair in document.pairs]
    logits = np.array([known[pair.ids.tobytes()] for pair in all_pairs], np.float32)
    return [scored.score for scored in encoder.combine(documents, logits)], sum(map(len, all_pairs))


def shown(qrels, run) -> str:
    return f"{run_metrics(qrels, run, [METRIC])[METRIC]:.4f}"


if __name__ == "__main__":
    main()
