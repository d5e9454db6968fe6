"""Scores and vectors computed by all processes of `accelerate launch` or torchrun together.

Every process must call it: a collective that one process leaves out hangs the others. That is why `compute_score`,
which scripts call on the first process alone, never does this by itself, and why an error of one process reaches all.
"""

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import chain, count

import torch
import torch.distributed as dist

from rag_retrieval.core.distributed import gather, is_distributed, on_all, on_main
from rag_retrieval.models.calibration import probabilities_of
from rag_retrieval.models.inputs import check_flag, check_pairs
from rag_retrieval.models.outputs import Output, Results, in_order, taken
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.scoring import (
    BatchModel,
    Precision,
    Scorer,
    ScoringOptions,
    check_options,
    encoder_for,
    inference,
    plan_forwards,
    run_forwards,
    score_pairs,
    token_budget,
)
from rag_retrieval.models.text_scoring import CHUNK_TEXTS, Texts, chunks_of, distinct, prefetch
from rag_retrieval.models.token_batch import TextSize, sizes_of

Plan = list[list[int]]  # of one chunk: the positions of the texts of each forward, among the distinct ones
Encode = Callable[[Texts], list[EncodedPair]]


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
    if is_distributed():
        on_all(lambda: check_options(scorer, options, [scorer.device]))
        pairs = on_all(lambda: check_pairs(pairs))
        scores = run_over_processes(scorer, pairs, encoder_for(scorer, max_length).encode, options)
    else:
        scores = score_pairs(scorer, check_pairs(pairs), options)
    return probabilities_of(scores, scorer.calibration).values if normalize else scores


def run_over_processes(model: BatchModel, texts: Texts, encode: Encode, options: ScoringOptions) -> Output:
    """The model's results for checked texts, in their order, the same on every process; see `score_over_processes`."""
    check_agreement(texts, options)
    unique, places = distinct(texts)
    plans = agreed_plans(model, unique, encode, options)
    results = on_all(lambda: run_share(model, unique, encode, share_of(plans), options))
    return taken(in_order(chain.from_iterable(gather(results))), torch.tensor(places, dtype=torch.long))


def check_agreement(texts: Texts, options: ScoringOptions) -> None:
    """Raises ValueError on every process when texts or options of some differ from those of the first."""
    checksum = 0
    for text in chain.from_iterable((text,) if isinstance(text, str) else text for text in texts):
        checksum = zlib.crc32(text.encode() + b"\0", checksum)
    first, *others = gather((len(texts), checksum, options))
    for process, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                "every process must pass the same texts and options: process 0 has "
                f"{first[0]} texts and {first[2]}, process {process} has {other[0]} texts and {other[2]}"
                + (", other texts" if (other[0], other[2]) == (first[0], first[2]) else "")
            )


def agreed_plans(model: BatchModel, texts: Texts, encode: Encode, options: ScoringOptions) -> list[Plan]:
    """The plan of every chunk, as one process makes it, but tokenized by all and with the smallest token budget."""
    gathered = gather((on_all(lambda: sizes_of_share(texts, encode)), token_budget(model)))
    sizes = list(chain.from_iterable(share for share, _ in gathered))
    max_tokens = min(tokens for _, tokens in gathered)
    return on_main(lambda: plans_of(model, texts, sizes, options, max_tokens))


def plans_of(
    model: BatchModel, texts: Texts, sizes: list[TextSize], options: ScoringOptions, max_tokens: int
) -> list[Plan]:
    plans, start = [], 0
    with inference(model, options.precision):
        for chunk in chunks_of(texts, CHUNK_TEXTS):
            parts = plan_forwards(model, sizes[start : start + len(chunk)], options.batch_size, max_tokens)
            plans.append([[start + position for position in part] for part in parts])
            start += len(chunk)
    return plans


def sizes_of_share(texts: Texts, encode: Encode) -> list[TextSize]:
    """Sizes of the texts of this process's stretch; the stretches of all processes follow one another."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = texts[len(texts) * rank // world : len(texts) * (rank + 1) // world]
    return [size for chunk in chunks_of(share, CHUNK_TEXTS) for size in sizes_of(encode(chunk))]


def share_of(plans: list[Plan]) -> list[Plan]:
    """This process's forwards of every chunk, one in turn: neighbours in a plan have similar lengths."""
    turn = count()
    rank, world = dist.get_rank(), dist.get_world_size()
    share = [[part for part in plan if next(turn) % world == rank] for plan in plans]
    return [plan for plan in share if plan]


def run_share(
    model: BatchModel, texts: Texts, encode: Encode, plans: list[Plan], options: ScoringOptions
) -> list[Results]:
    """The results of all forwards of this process, on the CPU, with their positions in the whole list."""

    def encode_plan(plan: Plan):
        positions = list(chain.from_iterable(plan))
        return plan, dict(zip(positions, encode([texts[position] for position in positions]), strict=True))

    with inference(model, options.precision), closing(prefetch(encode_plan, plans)) as encoded_plans:
        return [run_forwards(model, encoded, deque(plan), options.batch_size) for plan, encoded in encoded_plans]
