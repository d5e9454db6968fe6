"""Scores of encoded pairs from a graph that takes padded batches: planned by tokens, given back in input order.

Which pairs share a forward never changes a score beyond float noise, in int8 neither:
there every token has a scale of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import make_batch, plan_by_tokens

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], np.ndarray]  # padded inputs, each [pairs, longest] int64, to [pairs] float32


def score_padded(
    run: Run,
    pairs: Sequence[EncodedPair],
    names: Sequence[str],
    pad_token_id: int,
    batch_size: int,
    max_tokens: int,
) -> np.ndarray:
    """Scores in input order: [pairs], float32.

    names: of the inputs that the graph takes. batch_size: pairs of one forward at most. max_tokens: of one forward,
    padding included; a longer pair is a forward of its own. Longest pairs come first, so that memory peaks at once.
    """
    scores = np.empty(len(pairs), np.float32)
    parts = plan_by_tokens([[len(pair)] for pair in pairs], max_tokens, padded=True, max_pairs=batch_size)
    for part in parts if pairs else ():
        scores[part] = run(padded_inputs([pairs[position] for position in part], names, pad_token_id))
    return scores


def padded_inputs(pairs: Sequence[EncodedPair], names: Sequence[str], pad_token_id: int) -> Inputs:
    """Right-padded inputs of at least one pair."""
    batch = make_batch(pairs)
    real = np.arange(batch.lengths.max()) < batch.lengths[:, None]
    inputs = {name: np.zeros(real.shape, np.int64) for name in names}
    inputs["input_ids"][~real] = pad_token_id
    inputs["input_ids"][real] = batch.ids
    inputs["attention_mask"][real] = 1
    if "token_type_ids" in inputs:
        inputs["token_type_ids"][real] = batch.types
    return inputs
