"""What an index of token vectors takes and loses: by the numbers that are kept, by where candidates come from.

    python benchmarks/token_index.py --data shared/cranfield --model MODEL --work FOLDER

Documents and queries are encoded once; then their vectors are kept in each way, and the queries of a split are searched
for. A model without token vectors gets a projection to `--colbert_dim` numbers that has learnt nothing: figures of it
say what codes lose, not how well token vectors search. `best`: of the 10 best documents by float32 over all documents,
the part that is found. Milliseconds are CPU time.
"""

import argparse
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rag_retrieval import Embedder
from rag_retrieval.data.beir import read_folder, read_qrels
from rag_retrieval.metrics import run_metrics
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.representations import MULTI_VECTOR
from rag_retrieval.retrieval import token_codec
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.encoding import Encoded, represent_with
from rag_retrieval.retrieval.multi_vector import CentroidSearch, MultiVectorSearch
from rag_retrieval.retrieval.token_vectors import StoredTokens, TokenVectors
from rag_retrieval.retrieval.vector_shards import TokenWriter

CPU = torch.device("cpu")
PRECISIONS = ("float32", "float16", "int8", "residual4", "residual2", "residual1")
CANDIDATES = ("all", "tokens")
DEPTH, BEST = 100, 10
ENCODED = 64  # texts at once
COLUMNS = {"kept as": 10, "candidates": 11, "bytes": 6, "MB": 7, "best": 6, "ndcg@10": 8, "recall@100": 11, "ms": 8}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in BEIR layout")
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", required=True)
    parser.add_argument("--colbert_dim", type=int, default=128, help="of a projection, where the model has none")
    parser.add_argument("--work", type=Path, required=True, help="folder for model and vectors")
    parser.add_argument("--pool_factor", type=float, default=1)
    parser.add_argument("--max_length", type=int, default=None, help="tokens of a text")
    options = parser.parse_args(arguments)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    documents, queries, ids, qrels = encoded(options)
    print(f"{len(ids):,} documents of {len(documents.vectors) / len(ids):.0f} vectors, {len(qrels)} queries of "
          f"{len(queries.vectors) / len(qrels):.0f}")  # fmt: skip
    print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    for row in rows(options.work, documents, queries, ids, qrels):
        print(" ".join(f"{value:>{width}}" for value, width in zip(row, COLUMNS.values(), strict=True)), flush=True)


def encoded(options: argparse.Namespace) -> tuple[TokenVectors, TokenVectors, list[str], dict]:
    """Documents, queries, ids of the documents, grades by query."""
    folder = read_folder(options.data)
    qrels = read_qrels(folder, options.split)
    embedder = Embedder(with_token_vectors(options), device="cpu", max_length=options.max_length)
    kept = IndexOptions(embedder="-", bm25=False, representations=(MULTI_VECTOR,), pool_factor=options.pool_factor)
    texts = {"document": list(folder.documents.values()), "query": [folder.queries[query] for query in qrels]}
    vectors = {}
    for kind, of_kind in texts.items():
        represent, start = represent_with(embedder, kind, kept), time.process_time()
        blocks = [represent(of_kind[place : place + ENCODED]) for place in range(0, len(of_kind), ENCODED)]
        vectors[kind] = TokenVectors.of([text for block in blocks for text in block.multi_vector.texts()])
        print(f"{len(of_kind):,} texts encoded in {time.process_time() - start:.0f} CPU seconds")
    return vectors["document"], vectors["query"], list(folder.documents), qrels


def with_token_vectors(options: argparse.Namespace) -> str:
    embedder = Embedder(options.model, device="cpu")
    if MULTI_VECTOR in embedder.settings.representations:
        return options.model
    torch.manual_seed(0)
    wanted = {"representations": (MULTI_VECTOR,), "colbert_dim": options.colbert_dim}
    folder = options.work / "model"
    EmbeddingModel.from_pretrained(options.model, **wanted).save_pretrained(folder)
    return str(folder)


def rows(
    work: Path, documents: TokenVectors, queries: TokenVectors, ids: list[str], qrels: dict
) -> Iterator[tuple[str, ...]]:
    none, best = [np.zeros(0, np.int64)] * len(qrels), None
    for precision in PRECISIONS:
        search, size = kept_as(work / precision, precision, documents)
        for candidates in CANDIDATES:
            start = time.process_time()
            found = search[candidates].search_vectors(queries, none, DEPTH)
            milliseconds = (time.process_time() - start) / len(qrels) * 1000
            rows_found = [one.rows[:BEST].tolist() for one in found]
            best = best or rows_found  # the first is exact
            pairs = zip(best, rows_found, strict=True)
            part = np.mean([len(set(first) & set(now)) / len(first) for first, now in pairs])
            run = {
                query: dict(zip([ids[row] for row in one.rows.tolist()], one.scores.tolist(), strict=True))
                for query, one in zip(qrels, found, strict=True)
            }
            values = [f"{value:.4f}" for value in run_metrics(qrels, run, ["ndcg@10", "recall@100"]).values()]
            sizes = (f"{size / len(documents.vectors):.0f}", f"{size / 1e6:.1f}")
            yield (precision, candidates, *sizes, f"{part:.3f}", *values, f"{milliseconds:.1f}")


def kept_as(folder: Path, precision: str, documents: TokenVectors) -> tuple[dict[str, MultiVectorSearch], int]:
    """The searches by their candidates, and the bytes of the vectors."""
    options = IndexOptions(
        embedder="-", bm25=False, representations=(MULTI_VECTOR,), token_precision=precision, token_candidates="tokens"
    )
    folder.mkdir(parents=True)
    token_codec.fit(documents, len(documents.counts), options, CPU, folder)
    writer = TokenWriter(options, folder, CPU, [])
    writer.append(folder, writer.encoded(Encoded(None, None, documents)))
    writer.finish(folder)
    stored = StoredTokens([folder], writer.codec)
    first = CentroidSearch(token_codec.read_centroids(folder), [folder])
    searches = {
        "all": MultiVectorSearch(stored, None, CPU),
        "tokens": MultiVectorSearch(stored, None, CPU, first, options.rescore_factor),
    }
    return searches, (folder / "tokens.npy").stat().st_size


if __name__ == "__main__":
    main()
