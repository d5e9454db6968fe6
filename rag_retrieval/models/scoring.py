"""Scores and vectors on one device or several: forwards planned by tokens, in eval mode, in the precision asked for.

How texts share a forward never changes a result beyond float noise, so the plan may change while it runs: a forward
that does not fit in the memory of the GPU is made smaller and repeated. Precision is autocast: weights keep their
dtype, and a head gives its score in float32 whatever the precision.
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
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import nn

from rag_retrieval.core.log import Progress
from rag_retrieval.models.calibration import Calibration
from rag_retrieval.models.cpu_products import fast_products
from rag_retrieval.models.devices import check_devices
from rag_retrieval.models.outputs import Output, Results, concatenated, in_order, with_token_vectors_on_cpu
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.text_scoring import CHUNK_TEXTS, Pairs, score_texts
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
OF_TORCH = vars(nn.Module()).keys()  # attributes of every module
FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, x86, ARM, ARM

Model = TypeVar("Model", bound="BatchModel")


class BatchModel(Protocol):
    """What a forward needs of a model, an nn.Module that gives the scores of a batch of pairs, [pairs], float32, or the
    `Representations` of a batch of texts. fitting_tokens: the most that a forward may hold since one ran out of memory,
    None where none did. dtype: of the weights. An embedder also takes the names of representations."""

    fitting_tokens: int | None
    device: torch.device
    dtype: torch.dtype
    packs: bool
    shares_queries: bool

    def check_max_length(self, max_length: int) -> None: ...

    def __call__(self, batch: TokenBatch) -> Output: ...


class Scorer(BatchModel, Protocol):
    pair_encoder: PairEncoder
    calibration: Calibration | None


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


def replicas(model: Model, devices: Sequence[torch.device]) -> list[Model]:
    """The model on each device: itself where it is, else a copy; copies on the model's own device share weights."""
    own = list(devices).index(model.device) if model.device in devices else None
    return [model if place == own else replica(model, device) for place, device in enumerate(devices)]


def replica(model: Model, device: torch.device) -> Model:
    """What is no module and no tensor, such as the encoder of its texts and its settings, is shared."""
    memo = {id(value): value for name, value in vars(model).items() if name not in OF_TORCH}
    for tensor in chain(model.parameters(), model.buffers()):
        moved = tensor.detach().to(device)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(model, memo)


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
def inference(model: BatchModel, precision: Precision | None) -> Iterator[None]:
    """Eval mode without gradients, and autocast. precision None: half precision for float32 weights on CUDA, none
    elsewhere. Both hold for the thread that enters the block."""
    device = model.device
    if precision is None and device.type == "cuda" and model.dtype == torch.float32:
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    plain = precision in (None, "no")
    with (
        evaluating(model),
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
            return run_encoded(scorers, encoded, options.batch_size, options.precision, progress).tolist()

        scores = score_texts(pairs, encode, score, CHUNK_TEXTS * len(scorers))
        progress.update(len(pairs) - progress.done)  # those that repeat others
    return torch.tensor(scores, dtype=torch.float32)


def run_encoded(
    models: Sequence[BatchModel],
    encoded: Sequence[EncodedPair],
    batch_size: int,
    precision: Precision | None = None,
    progress: Progress | None = None,
    outputs: Sequence[str] | None = None,
) -> Output:
    """Results in the order of `encoded`, float32, on the CPU. A device is waited for once.

    models: replicas of one model; a thread for each takes one forward after another. outputs: of an embedder, the names
    of the representations that are wanted; None for all that it has.
    """
    with inference(models[0], precision):
        budget = min(map(token_budget, models))
        waiting = deque(plan_forwards(models[0], sizes_of(encoded), batch_size, budget))

    def run(model: BatchModel) -> Results:
        with inference(model, precision):
            return run_forwards(model, encoded, waiting, batch_size, progress, outputs)

    if len(models) == 1:
        results = [run(models[0])]
    else:
        with ThreadPoolExecutor(len(models), thread_name_prefix="scoring") as threads:
            try:
                results = list(threads.map(run, models))
            finally:
                waiting.clear()  # after an error or an interrupt the other threads end with their present forward
    return in_order(results)


def plan_forwards(model: BatchModel, sizes: Sequence[TextSize], batch_size: int, max_tokens: int) -> list[list[int]]:
    """Positions in forwards: pairs of one query together where it is computed once, else texts of similar length,
    longest first so that running out of memory shows at once."""
    if model.shares_queries:
        return plan_sharing(sizes, max_tokens, batch_size)
    lengths = [[size.tokens] for size in sizes]
    return plan_by_tokens(lengths, max_tokens, padded=not model.packs, max_pairs=batch_size)


def token_budget(model: BatchModel) -> int:
    """Tokens of one forward at most, on the model's device and after what did not fit there."""
    tokens = CUDA_TOKENS if model.device.type == "cuda" else CPU_TOKENS
    return tokens if model.fitting_tokens is None else min(tokens, model.fitting_tokens)


def run_forwards(
    model: BatchModel,
    encoded: Sequence[EncodedPair] | Mapping[int, EncodedPair],
    waiting: deque[list[int]],
    batch_size: int,
    progress: Progress | None = None,
    outputs: Sequence[str] | None = None,
) -> Results:
    """Results of the forwards of `waiting`, until none is left; several threads may share it.

    The device is read once, at the end, but for token vectors: the host would wait for each forward. Where one does
    not fit in memory, all that remain are planned again, smaller.
    """
    all_positions, all_results = [], []
    while waiting:
        try:
            part = waiting.popleft()
        except IndexError:  # another thread took the last one
            break
        results = forward_if_it_fits(model, [encoded[position] for position in part], outputs)
        if results is not None:
            if progress is not None:
                progress.update(len(part))
            all_positions += part
            all_results.append(with_token_vectors_on_cpu(results))
            continue
        sizes = sizes_of(encoded[position] for position in part)
        tokens = computed_tokens(sizes, padded=not model.packs, shares_queries=model.shares_queries)
        model.fitting_tokens = tokens // 2  # not of the budget: `batch_size` may have bounded the part before it
        remaining = part
        while waiting:
            remaining = remaining + waiting.popleft()
        sizes = sizes_of(encoded[position] for position in remaining)
        replanned = plan_forwards(model, sizes, batch_size, model.fitting_tokens)
        waiting.extend([remaining[place] for place in part] for part in replanned)
    return all_positions, concatenated(all_results)


def forward_if_it_fits(
    model: BatchModel, texts: list[EncodedPair], outputs: Sequence[str] | None = None
) -> Output | None:
    """Results of the texts on the model's device, or None where several do not fit in its memory together.

    Raises torch.cuda.OutOfMemoryError for a single text that does not fit.
    """
    batch = make_batch(texts)
    try:
        with fast_products(model.device, len(batch.ids)):
            return model(batch) if outputs is None else model(batch, outputs)
    except torch.cuda.OutOfMemoryError as error:
        if len(texts) == 1:
            raise torch.cuda.OutOfMemoryError(
                f"one text of {len(texts[0])} tokens does not fit in the memory of {model.device}: {error}; "
                "use a smaller max_length or half precision"
            ) from error
    # not in the handler, where the traceback still holds the activations
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return None
