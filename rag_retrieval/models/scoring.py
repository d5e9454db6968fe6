"""Scores on one device or several: forwards planned by tokens, in eval mode, in the precision that was asked for.

How pairs share a forward never changes a score beyond float noise, so the plan may change while it runs: a forward that
does not fit in the memory of the GPU is made smaller and repeated. Precision is autocast: weights keep their dtype, and
the head gives its score in float32 whatever the precision.
"""

import copy
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal, Protocol, get_args

import torch
from torch import nn

from rag_retrieval.core.log import Progress
from rag_retrieval.models.calibration import Calibration
from rag_retrieval.models.devices import check_devices
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.text_scoring import CHUNK_PAIRS, Pairs, score_texts
from rag_retrieval.models.token_batch import (
    CPU_TOKENS,
    CUDA_TOKENS,
    TextSize,
    TokenBatch,
    computed_tokens,
    make_batch,
    plan_by_tokens,
    plan_sharing,
    sizes_of,
)

logger = logging.getLogger(__name__)

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, x86, ARM, ARM

Scored = tuple[list[int], torch.Tensor]  # positions of the pairs of some forwards, and their scores: [pairs]


class Scorer(Protocol):
    """What scoring needs of a model, which is an nn.Module. fitting_tokens: the most that a forward may hold since one
    ran out of memory, None where none did. dtype: of the weights."""

    pair_encoder: PairEncoder
    fitting_tokens: int | None
    device: torch.device
    dtype: torch.dtype
    packs: bool
    shares_queries: bool
    calibration: Calibration | None

    def check_max_length(self, max_length: int) -> None: ...

    def __call__(self, batch: TokenBatch) -> torch.Tensor: ...


@dataclass(frozen=True)
class ScoringOptions:
    """batch_size: pairs of one forward at most. max_length: tokens per pair, None for the model's own.
    precision: of the autocast, None for the device's own choice."""

    batch_size: int = 256
    max_length: int | None = None
    precision: Precision | None = None


def check_options(scorer: Scorer, options: ScoringOptions, devices: Iterable[torch.device]) -> None:
    """Raise ValueError for options that the model or one of the devices cannot take."""
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {options.batch_size}")
    encoder_for(scorer, options.max_length)
    for device in devices:
        check_precision(options.precision, device)


def encoder_for(scorer: Scorer, max_length: int | None) -> PairEncoder:
    if max_length is None or max_length == scorer.pair_encoder.max_length:
        return scorer.pair_encoder
    scorer.check_max_length(max_length)
    return scorer.pair_encoder.with_max_length(max_length)


# ---- devices ---------------------------------------------------------------------------------------------


def replicas(scorer: Scorer, devices: Sequence[torch.device]) -> list[Scorer]:
    """The scorer on each device: itself where it is, else a copy; copies on the scorer's own device share weights."""
    own = list(devices).index(scorer.device) if scorer.device in devices else None
    return [scorer if place == own else replica(scorer, device) for place, device in enumerate(devices)]


def replica(scorer: Scorer, device: torch.device) -> Scorer:
    shared = (scorer.pair_encoder, scorer.settings, scorer.calibration)
    memo = {id(value): value for value in shared}
    for tensor in chain(scorer.parameters(), scorer.buffers()):
        moved = tensor.detach().to(device)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(scorer, memo)


# ---- precision and mode ----------------------------------------------------------------------------------


def check_precision(precision: Precision | None, device: torch.device) -> None:
    """Raise ValueError for a precision that is not known or that the device has not; warn, once, of bf16 on a
    CPU without instructions for it: it is computed there, but slower than float32."""
    if precision is not None and precision not in get_args(Precision):
        names = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(f"precision must be None or one of {names}; found {precision!r}")
    if device.type != "cpu":
        return
    if precision == "fp16":
        raise ValueError("precision 'fp16' needs a GPU, and the device is the CPU; use 'bf16' or 'no'")
    if precision == "bf16":
        warn_of_slow_bf16()


@cache
def warn_of_slow_bf16() -> None:
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in FAST_BF16):
        logger.warning(
            "precision 'bf16': this CPU has no bfloat16 instructions (AVX512_BF16 or AMX on x86), so scoring "
            "in bf16 is slower than in float32; use precision 'no'"
        )


@contextmanager
def scoring_mode(scorer: Scorer, precision: Precision | None) -> Iterator[None]:
    """Eval mode without gradients, and autocast. precision None: half precision for float32 weights on CUDA, none
    elsewhere. Both hold for the thread that enters the block."""
    device = scorer.device
    if precision is None and device.type == "cuda" and scorer.dtype == torch.float32:
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    plain = precision in (None, "no")
    with (
        evaluating(scorer),
        nullcontext() if plain else torch.autocast(device.type, dtype=DTYPES[precision]),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients. Each module gets its own mode back, since parts of a model may be in eval mode
    while it trains."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


# ---- scores ----------------------------------------------------------------------------------------------


def score_pairs(
    scorer: Scorer,
    pairs: Pairs,
    options: ScoringOptions,
    devices: Sequence[str | torch.device] | None = None,
    show_progress_bar: bool | None = None,
) -> torch.Tensor:
    """Scores of checked pairs, in their order: [pairs], float32, on the CPU. See `PairScorer.compute_score`."""
    devices = [scorer.device] if devices is None else check_devices(devices)
    check_options(scorer, options, devices)
    scorers = replicas(scorer, devices)
    if show_progress_bar is None:
        show_progress_bar = len(pairs) > 10 * options.batch_size and sys.stderr.isatty()
    encode = encoder_for(scorer, options.max_length).encode
    with Progress(len(pairs), "scoring", "pairs", shown=show_progress_bar) as progress:

        def score(encoded: Sequence[EncodedPair]) -> list[float]:
            return score_encoded(scorers, encoded, options.batch_size, options.precision, progress).tolist()

        scores = score_texts(pairs, encode, score, CHUNK_PAIRS * len(scorers))
        progress.update(len(pairs) - progress.done)  # those that repeat others
    return torch.tensor(scores, dtype=torch.float32)


def score_encoded(
    scorers: Sequence[Scorer],
    encoded: Sequence[EncodedPair],
    batch_size: int,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Scores in the order of `encoded`: [pairs], float32, on the CPU. A device is waited for once.

    scorers: replicas of one model; a thread for each takes one forward after another.
    """
    with scoring_mode(scorers[0], precision):
        budget = min(map(token_budget, scorers))
        waiting = deque(plan_forwards(scorers[0], sizes_of(encoded), batch_size, budget))

    def score(scorer: Scorer) -> Scored:
        with scoring_mode(scorer, precision):
            return score_forwards(scorer, encoded, waiting, batch_size, progress)

    if len(scorers) == 1:
        scored = [score(scorers[0])]
    else:
        with ThreadPoolExecutor(len(scorers), thread_name_prefix="scoring") as threads:
            try:
                scored = list(threads.map(score, scorers))
            finally:
                waiting.clear()  # after an error or an interrupt the other threads end with their present forward
    scores = torch.empty(len(encoded), dtype=torch.float32)
    for positions, values in scored:
        scores[positions] = values
    return scores


def plan_forwards(scorer: Scorer, sizes: Sequence[TextSize], batch_size: int, max_tokens: int) -> list[list[int]]:
    """Positions in forwards: pairs of one query together where it is computed once, else pairs of similar length,
    longest first so that running out of memory shows at once."""
    if scorer.shares_queries:
        return plan_sharing(sizes, max_tokens, batch_size)
    lengths = [[size.tokens] for size in sizes]
    return plan_by_tokens(lengths, max_tokens, padded=not scorer.packs, max_pairs=batch_size)


def token_budget(scorer: Scorer) -> int:
    """Tokens of one forward at most, on the scorer's device and after what did not fit there."""
    tokens = CUDA_TOKENS if scorer.device.type == "cuda" else CPU_TOKENS
    return tokens if scorer.fitting_tokens is None else min(tokens, scorer.fitting_tokens)


def score_forwards(
    scorer: Scorer,
    encoded: Sequence[EncodedPair] | Mapping[int, EncodedPair],
    waiting: deque[list[int]],
    batch_size: int,
    progress: Progress | None = None,
) -> Scored:
    """Positions and scores, on the CPU, of the forwards of `waiting`, until none is left; several threads may share it.

    The device is read once, at the end: the host would wait for each forward. Where one does not fit in memory, all
    that remain are planned again, smaller.
    """
    scored_positions, all_scores = [], [torch.empty(0, dtype=torch.float32, device=scorer.device)]
    while waiting:
        try:
            part = waiting.popleft()
        except IndexError:  # another thread took the last one
            break
        scores = forward_if_it_fits(scorer, [encoded[position] for position in part])
        if scores is not None:
            if progress is not None:
                progress.update(len(part))
            scored_positions += part
            all_scores.append(scores)
            continue
        sizes = sizes_of(encoded[position] for position in part)
        tokens = computed_tokens(sizes, padded=not scorer.packs, shares_queries=scorer.shares_queries)
        scorer.fitting_tokens = tokens // 2  # not of the budget: `batch_size` may have bounded the part before it
        remaining = part
        while waiting:
            remaining = remaining + waiting.popleft()
        sizes = sizes_of(encoded[position] for position in remaining)
        replanned = plan_forwards(scorer, sizes, batch_size, scorer.fitting_tokens)
        waiting.extend([remaining[place] for place in part] for part in replanned)
    return scored_positions, torch.cat(all_scores).cpu()


def forward_if_it_fits(scorer: Scorer, pairs: list[EncodedPair]) -> torch.Tensor | None:
    """Scores of the pairs on the scorer's device, or None where several do not fit in its memory together.

    Raises torch.cuda.OutOfMemoryError for a single pair that does not fit.
    """
    try:
        return scorer(make_batch(pairs))
    except torch.cuda.OutOfMemoryError as error:
        if len(pairs) == 1:
            raise torch.cuda.OutOfMemoryError(
                f"one pair of {len(pairs[0])} tokens does not fit in the memory of {scorer.device}: {error}; "
                "score with a smaller max_length or in half precision"
            ) from error
    # not in the handler, where the traceback still holds the activations
    if scorer.device.type == "cuda":
        torch.cuda.empty_cache()
    return None
