"""From a list of pairs to their scores: chunks tokenized ahead, forwards planned by tokens, input order.

What a reader would get wrong: how pairs share a forward never changes a score beyond float noise, so the plan
may change while it runs. A forward that does not fit in the memory of the GPU is cut smaller and repeated, and
no other error is taken for that.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from rag_retrieval.models.loading import check_max_length
from rag_retrieval.models.one_ahead import one_ahead
from rag_retrieval.models.pair_batch import make_batch
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.scoring_mode import Precision, check_precision, scoring_mode
from rag_retrieval.models.token_budget import PairSize, computed_tokens, plan_by_tokens, plan_sharing

if TYPE_CHECKING:
    from rag_retrieval.models.pair_scorer import PairScorer

SCORING_CHUNK = 4096  # pairs tokenized and sorted together; bounds memory on endless lists
CPU_TOKENS = 2048  # of one forward: they stay in the CPU's caches and keep its cores busy
CUDA_TOKENS = 65_536  # of one forward, until one does not fit

Pairs = Sequence[tuple[str, str]]
Scored = tuple[list[int], torch.Tensor]  # positions of the pairs of one forward, and their scores: [pairs]


@dataclass(frozen=True)
class ScoringOptions:
    """batch_size: pairs of one forward at most. max_length: tokens per pair, None for the model's own.
    precision: of the autocast, None for the device's own choice."""

    batch_size: int = 256
    max_length: int | None = None
    precision: Precision | None = None


def check_options(scorer: "PairScorer", options: ScoringOptions, devices: Iterable[torch.device]) -> None:
    """Raise ValueError for options that the model or one of the devices cannot take."""
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {options.batch_size}")
    encoder_for(scorer, options.max_length)
    for device in devices:
        check_precision(options.precision, device)


def encoder_for(scorer: "PairScorer", max_length: int | None) -> PairEncoder:
    encoder = scorer.pair_encoder
    if max_length is None or max_length == encoder.max_length:
        return encoder
    check_max_length(max_length, scorer.model)
    return encoder.with_max_length(max_length)


def score_pairs(scorer: "PairScorer", pairs: Pairs, options: ScoringOptions, bar: tqdm) -> torch.Tensor:
    """Scores on the scorer's own device, in this process: [pairs], float32, on the CPU, in input order."""
    encode = encoder_for(scorer, options.max_length).encode
    chunks = [pairs[start : start + SCORING_CHUNK] for start in range(0, len(pairs), SCORING_CHUNK)]
    scores = [torch.empty(0)]
    with mode_of(scorer, options.precision), closing(one_ahead(encode, chunks)) as encoded_chunks:
        scores += [score_chunk(scorer, encoded, options.batch_size, bar) for encoded in encoded_chunks]
    return torch.cat(scores)


def mode_of(scorer: "PairScorer", precision: Precision | None):
    return scoring_mode(scorer, scorer.device, scorer.model.dtype, precision)


def score_chunk(scorer: "PairScorer", encoded: Sequence[EncodedPair], batch_size: int, bar: tqdm) -> torch.Tensor:
    """Scores of one chunk, in its order: [len(encoded)], float32, on the CPU. The device is waited for once."""
    parts = plan_forwards(scorer, sizes_of(encoded), batch_size, token_budget(scorer))
    positions, values = joined(score_parts(scorer, encoded, parts, batch_size, bar))
    scores = torch.empty(len(encoded))
    scores[positions] = values
    return scores


def sizes_of(encoded: Iterable[EncodedPair]) -> list[PairSize]:
    return [
        PairSize(len(pair), pair.document_start, hash(tuple(pair.ids[: pair.document_start]))) for pair in encoded
    ]


def plan_forwards(
    scorer: "PairScorer", sizes: Sequence[PairSize], batch_size: int, max_tokens: int
) -> list[list[int]]:
    """Positions in forwards: pairs of one query together where it is computed once, else pairs of similar length,
    longest first so that memory peaks at once."""
    if scorer.shares_queries:
        return plan_sharing(sizes, max_tokens, batch_size)
    lengths = [[size.tokens] for size in sizes]
    return plan_by_tokens(lengths, max_tokens, padded=not scorer.packs, max_pairs=batch_size)


def token_budget(scorer: "PairScorer") -> int:
    """Tokens of one forward at most, on the scorer's device and after what was found not to fit there."""
    tokens = CUDA_TOKENS if scorer.device.type == "cuda" else CPU_TOKENS
    return tokens if scorer.fitting_tokens is None else min(tokens, scorer.fitting_tokens)


def joined(scored: Iterable[Scored]) -> tuple[list[int], torch.Tensor]:
    """The positions of several forwards and their scores on the CPU; there must be at least one."""
    parts, scores = zip(*scored, strict=True)
    return list(chain.from_iterable(parts)), torch.cat(scores).cpu()


def score_parts(
    scorer: "PairScorer",
    encoded: Sequence[EncodedPair] | Mapping[int, EncodedPair],
    parts: list[list[int]],
    batch_size: int,
    bar: tqdm,
) -> Iterator[Scored]:
    """One forward per part, its scores left on the device: waiting for them would idle it.

    parts: positions in `encoded`. Where one does not fit in memory, all that remain are planned again, smaller.
    """
    waiting = deque(parts)
    while waiting:
        part = waiting.popleft()
        scores = forward_if_it_fits(scorer, [encoded[position] for position in part])
        if scores is not None:
            bar.update(len(part))
            yield part, scores
            continue
        sizes = sizes_of(encoded[position] for position in part)
        tokens = computed_tokens(sizes, padded=not scorer.packs, shares_queries=scorer.shares_queries)
        scorer.fitting_tokens = tokens // 2  # not of the budget: `batch_size` may have cut the part before it
        remaining = [*part, *chain.from_iterable(waiting)]
        sizes = sizes_of(encoded[position] for position in remaining)
        replanned = plan_forwards(scorer, sizes, batch_size, scorer.fitting_tokens)
        waiting = deque([remaining[place] for place in part] for part in replanned)


def forward_if_it_fits(scorer: "PairScorer", pairs: list[EncodedPair]) -> torch.Tensor | None:
    """Scores of the pairs on the scorer's device, or None where several do not fit in its memory together.

    Raises torch.cuda.OutOfMemoryError for a single pair that does not fit.
    """
    batch = make_batch(pairs)
    on_cuda = scorer.device.type == "cuda"
    try:
        return scorer((batch.pin_memory() if on_cuda else batch).to(scorer.device))
    except torch.cuda.OutOfMemoryError as error:
        if len(pairs) == 1:
            raise torch.cuda.OutOfMemoryError(
                f"one pair of {len(pairs[0])} tokens does not fit in the memory of {scorer.device}: {error}; "
                "score with a smaller max_length or in half precision"
            ) from error
    # not in the handler, where the traceback still holds the activations
    if on_cuda:
        torch.cuda.empty_cache()
    return None
