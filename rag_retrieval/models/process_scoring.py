"""Scoring shared by the processes of `accelerate launch` or torchrun.

Every process must call it: a collective that one process leaves out hangs the others. That is why `compute_score`,
which scripts call on the first process alone, never does this by itself, and why an error of one process reaches all.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from itertools import chain, count

import torch
import torch.distributed as dist

from rag_retrieval.core.distributed import gather, is_distributed, on_all, on_main
from rag_retrieval.models.calibration import probabilities_of
from rag_retrieval.models.inputs import check_flag, check_pairs
from rag_retrieval.models.scoring import (
    Precision,
    Scored,
    Scorer,
    ScoringOptions,
    check_options,
    encoder_for,
    plan_forwards,
    score_forwards,
    score_pairs,
    scoring_mode,
    token_budget,
)
from rag_retrieval.models.text_scoring import CHUNK_PAIRS, Pairs, chunks_of, distinct, prefetch
from rag_retrieval.models.token_batch import TextSize, sizes_of

Plan = list[list[int]]  # of one chunk: the positions of the pairs of each forward, among the distinct ones


def score_over_processes(
    scorer: Scorer,
    pairs: Sequence[Sequence[str]] | Sequence[str],
    batch_size: int = 256,
    max_length: int | None = None,
    normalize: bool = False,
    precision: Precision | None = None,
) -> torch.Tensor:
    """`compute_score` shared by all processes of the group: [pairs], float32, on the CPU, the same on every one.

    Each process passes the same pairs and options and a whole copy of the same model; FSDP and ZeRO-3, which shard
    it, cannot be used. The forwards are those of one process, distributed, so that scores equal compute_score's to the
    last digit where threads and devices are alike and no memory runs out. Without a group of several processes it
    is compute_score. Raises ValueError on every process when their pairs or options differ, and an error on every
    process when one of them fails.
    """
    check_flag("normalize", normalize)
    options = ScoringOptions(batch_size, max_length, precision)
    if not is_distributed():
        scores = score_pairs(scorer, check_pairs(pairs), options)
        return probabilities_of(scores, scorer.calibration).values if normalize else scores
    on_all(lambda: check_options(scorer, options, [scorer.device]))
    pairs = on_all(lambda: check_pairs(pairs))
    check_agreement(pairs, options)
    unique, places = distinct(pairs)
    plans = agreed_plans(scorer, unique, options)
    scored = on_all(lambda: score_share(scorer, unique, share_of(plans), options))
    scores = torch.empty(len(unique), dtype=torch.float32)
    for positions, values in chain.from_iterable(gather(scored)):
        scores[positions] = values
    scores = scores[places]
    return probabilities_of(scores, scorer.calibration).values if normalize else scores


def check_agreement(pairs: Pairs, options: ScoringOptions) -> None:
    """Raises ValueError on every process when pairs or options of some differ from those of the first."""
    checksum = 0
    for text in chain.from_iterable(pairs):
        checksum = zlib.crc32(text.encode() + b"\0", checksum)
    first, *others = gather((len(pairs), checksum, options))
    for process, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                "score_over_processes needs the same pairs and options on every process: process 0 has "
                f"{first[0]} pairs and {first[2]}, process {process} has {other[0]} pairs and {other[2]}"
                + (", other texts" if (other[0], other[2]) == (first[0], first[2]) else "")
            )


def agreed_plans(scorer: Scorer, pairs: Pairs, options: ScoringOptions) -> list[Plan]:
    """The plan of every chunk, as one process makes it, but tokenized by all and with the smallest token budget."""
    gathered = gather((on_all(lambda: sizes_of_share(scorer, pairs, options)), token_budget(scorer)))
    sizes = list(chain.from_iterable(share for share, _ in gathered))
    max_tokens = min(tokens for _, tokens in gathered)
    return on_main(lambda: plans_of(scorer, pairs, sizes, options, max_tokens))


def plans_of(
    scorer: Scorer, pairs: Pairs, sizes: list[TextSize], options: ScoringOptions, max_tokens: int
) -> list[Plan]:
    plans, start = [], 0
    with scoring_mode(scorer, options.precision):
        for chunk in chunks_of(pairs, CHUNK_PAIRS):
            parts = plan_forwards(scorer, sizes[start : start + len(chunk)], options.batch_size, max_tokens)
            plans.append([[start + position for position in part] for part in parts])
            start += len(chunk)
    return plans


def sizes_of_share(scorer: Scorer, pairs: Pairs, options: ScoringOptions) -> list[TextSize]:
    """Sizes of the pairs of this process's stretch; the stretches of all processes follow one another."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = pairs[len(pairs) * rank // world : len(pairs) * (rank + 1) // world]
    encode = encoder_for(scorer, options.max_length).encode
    return [size for chunk in chunks_of(share, CHUNK_PAIRS) for size in sizes_of(encode(chunk))]


def share_of(plans: list[Plan]) -> list[Plan]:
    """This process's forwards of every chunk, one in turn: neighbours in a plan have similar lengths."""
    turn = count()
    rank, world = dist.get_rank(), dist.get_world_size()
    share = [[part for part in plan if next(turn) % world == rank] for plan in plans]
    return [plan for plan in share if plan]


def score_share(scorer: Scorer, pairs: Pairs, plans: list[Plan], options: ScoringOptions) -> list[Scored]:
    """The scores of all forwards of this process, on the CPU, with their positions in the whole list."""
    encoder = encoder_for(scorer, options.max_length)

    def encode(plan: Plan):
        positions = list(chain.from_iterable(plan))
        encoded = encoder.encode([pairs[position] for position in positions])
        return plan, dict(zip(positions, encoded, strict=True))

    with scoring_mode(scorer, options.precision), closing(prefetch(encode, plans)) as encoded_plans:
        return [score_forwards(scorer, encoded, deque(plan), options.batch_size) for plan, encoded in encoded_plans]
