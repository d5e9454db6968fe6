"""Float32 products of linear layers, on processors that torch does not use in full.

On x86 torch multiplies float32 matrices with Intel's MKL, which has AVX-512 for Intel's own processors alone. oneDNN,
which is in torch too, uses it on AMD's as well. On those that compute 512 bits at once it is about twice as fast
(`benchmarks/linear_products.py`).
"""

import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

LEAST_ROWS = 32  # tokens; below this, the way to oneDNN costs more than it gains


def fast_products(device: torch.device, tokens: int | None = None) -> AbstractContextManager:
    """While it is entered, linear layers on such a processor multiply with oneDNN, in this thread.

    tokens: of the forward, where it is one; few are left to MKL. None: of a training, where the number of rows must not
        choose the product. The processes have different numbers, and the product decides in which order the gradients
        of a weight and its bias are there; ZeRO-2 (DeepSpeed 0.19.8) adds them up over the processes in that order.
    """
    if device.type != "cpu" or not onednn_is_faster() or (tokens is not None and tokens < LEAST_ROWS):
        return nullcontext()
    return OneDnnProducts(1 if tokens is None else LEAST_ROWS)


@cache
def onednn_is_faster() -> bool:
    """Whether this is AMD's processor of Zen 5 (family 26) or later. Zen 4 computes AVX-512 in halves of 256 bits, and
    MKL is as fast there."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)$", text, flags=re.MULTILINE)
    return "AuthenticAMD" in text and family is not None and int(family[1]) >= 26


class OneDnnProducts(TorchFunctionMode):
    """`F.linear` of float32 on the CPU, forward and backward, by oneDNN. Equal to torch's but for float noise.

    least_rows: of the inputs; fewer are left to torch.
    """

    def __init__(self, least_rows: int = 1):
        super().__init__()
        self.least_rows = least_rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and suits(self.least_rows, *args):
            inputs, weight, *bias = args
            return OneDnnLinear.apply(inputs, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))


def suits(least_rows: int, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        {type(inputs), type(weight)} <= {Tensor, torch.nn.Parameter}  # not those of a trace, or in parts
        and weight.dtype == inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.layout == torch.strided
        and inputs.dim() > 1
        and inputs.numel() >= least_rows * inputs.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
    )


class OneDnnLinear(torch.autograd.Function):
    """inputs @ weight.T + bias. inputs: [..., columns]; weight: [outputs, columns]; bias: [outputs] or None."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            product(gradient, weight.T) if of_inputs else None,
            product(rows.T, inputs.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(inputs.to_mkldnn(), weight, bias).to_dense()
