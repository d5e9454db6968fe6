"""Before the server listens: the first batches of a model, and how many tokens it computes in BATCH_SECONDS."""

import time
from collections.abc import Callable, Sequence, Sized

from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.text_encoding import TextEncoder
from rag_retrieval.serve.batching import Batcher

BATCH_SECONDS = 0.2  # of a batch: what comes in meanwhile waits for it
LEAST_TOKENS, MOST_TOKENS = 512, 65_536  # of a batch that was measured


def warm_up(
    name: str,
    encoder: PairEncoder | TextEncoder,
    batcher: Batcher,
    items: Sequence[Sized],
    item_of: Callable[[EncodedPair], Sized],
    batch_tokens: int | None,
) -> None:
    """Sets the batcher's `batch_tokens`; None: what is computed in BATCH_SECONDS, at least LEAST_TOKENS. Raises what
    computing raises, and ValueError for a tokenizer with tokens that the model does not have.

    items: some that are short, and one that was cut or sliced, so that settings which cannot do that fail here.
    item_of: an item of what the encoder gives.
    """
    batcher.submit(items).result()  # memory, threads, kernels
    check_vocabulary(name, encoder, batcher, item_of)
    batcher.batch_tokens = measured_tokens(batcher, items) if batch_tokens is None else batch_tokens


def check_vocabulary(
    name: str, encoder: PairEncoder | TextEncoder, batcher: Batcher, item_of: Callable[[EncodedPair], Sized]
) -> None:
    """Computes the last token of the tokenizer: else a text could ask for a row that the embedding does not have."""
    vocabulary = encoder.fast_tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.get)
    try:
        batcher.submit([item_of(encoder.join([], [vocabulary[token]]))]).result()
    except Exception as error:
        last = f"the last token of its tokenizer, {token!r} ({vocabulary[token]})"
        raise ValueError(
            f"{name}: {last}, cannot be computed: {error}; the model's embedding may have fewer rows"
        ) from error


def measured_tokens(batcher: Batcher, items: Sequence[Sized]) -> int:
    """Tokens that are computed in BATCH_SECONDS, from LEAST_TOKENS to MOST_TOKENS. A few items would not show what a
    GPU can do, so they are doubled until they take half of that time."""
    items = list(items)
    while True:
        tokens, started = sum(map(len, items)), time.perf_counter()
        batcher.submit(items).result()
        seconds = time.perf_counter() - started
        if seconds >= BATCH_SECONDS / 2 or tokens >= MOST_TOKENS:
            return min(max(round(tokens / seconds * BATCH_SECONDS), LEAST_TOKENS), MOST_TOKENS)
        items = items * 2
