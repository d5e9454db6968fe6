"""The state a model is in while it scores: eval mode, no gradients, and the precision that was asked for.

Precision is autocast, not the weights' dtype: the weights stay as they are, and the head gives its score in
float32 whatever the precision (`score_in_float32`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Literal, get_args

import torch
from torch import nn

logger = logging.getLogger(__name__)

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, x86, ARM, ARM


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
    found = torch.cpu.get_capabilities()
    if not any(found.get(name) for name in FAST_BF16):
        logger.warning(
            "precision 'bf16': this CPU has no bfloat16 instructions (AVX512_BF16 or AMX on x86), so scoring "
            "in bf16 is slower than in float32; use precision 'no'"
        )


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


@contextmanager
def scoring_mode(model: nn.Module, device: torch.device, dtype: torch.dtype, precision: Precision | None):
    """`evaluating` with autocast to `precision`.

    device, dtype: of the model's weights. precision None is half precision for float32 weights on CUDA and none
    elsewhere.
    """
    with evaluating(model), autocast(device, dtype, precision):
        yield


def autocast(device: torch.device, dtype: torch.dtype, precision: Precision | None):
    if precision is None and device.type == "cuda" and dtype == torch.float32:
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision in (None, "no"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
