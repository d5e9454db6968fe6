"""The first scores of a server, before it listens: they take longest, and they tell how large a batch should be.

What a reader would get wrong: a batch is bounded because what comes in meanwhile waits for it. So the bound is a time,
and the tokens that fit into it hang on model and machine: they are measured.
"""

import time

from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.rerank_request import RerankRequest
from rag_retrieval.serve.served_model import ServedModel

BATCH_SECONDS = 0.2
LEAST_TOKENS, MOST_TOKENS = 512, 65_536  # of a batch that was measured
DOCUMENTS = 4


def warm_up_pairs(model: ServedModel) -> list[EncodedPair]:
    """Short ones, and one that must be cut or sliced, so that settings which cannot do that fail here."""
    long_text = "word " * 2 * model.backend.pair_encoder.max_length
    return model.encode(RerankRequest("query", ["document"] * DOCUMENTS + [long_text], text_shape=True)).pairs


def warm_up(model: ServedModel, batcher: Batcher, batch_tokens: int | None) -> None:
    """Sets the batcher's `batch_tokens`; None: what is scored in BATCH_SECONDS. Raises what scoring raises."""
    pairs = warm_up_pairs(model)
    batcher.submit(pairs).result()  # memory, threads, kernels
    batcher.batch_tokens = measured_tokens(batcher, pairs) if batch_tokens is None else batch_tokens


def measured_tokens(batcher: Batcher, pairs: list[EncodedPair]) -> int:
    """Tokens that are scored in BATCH_SECONDS, from LEAST_TOKENS to MOST_TOKENS. A few pairs would not show what a GPU
    can do, so they are doubled until they take half of that time."""
    while True:
        tokens, started = sum(map(len, pairs)), time.perf_counter()
        batcher.submit(pairs).result()
        seconds = time.perf_counter() - started
        if seconds >= BATCH_SECONDS / 2 or tokens >= MOST_TOKENS:
            return min(max(round(tokens / seconds * BATCH_SECONDS), LEAST_TOKENS), MOST_TOKENS)
        pairs = pairs * 2
