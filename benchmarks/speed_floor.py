"""The floor: the time that the matrix products of the real tokens take at the machine's measured GEMM rate.

It counts every pair on its own: a side that computes a prompt once for several pairs may come below it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rag_retrieval.models.cpu_products import product

TRAINING = 3  # forward, and a backward of twice its products
ROWS = {"cpu": (2048, 1024), "cuda": (16384, 8192)}  # tokens of a model's product, side of the square one


@dataclass(frozen=True)
class ModelCost:
    """matmul_parameters: weights that every token is multiplied with. attention_width: heads times their size."""

    matmul_parameters: int
    layers: int
    attention_width: int
    causal: bool

    def forward_flops(self, lengths: list[int]) -> int:
        """Multiplications and additions of one forward over pairs of these token lengths.

        2 x parameters for each token; in each layer 4 x length^2 x width for QK' and AV, half of it where tokens
        see only what stands before them. Embeddings, norms and the head's one row per pair are left out.
        """
        attention = 4 * sum(length**2 for length in lengths) * self.attention_width * self.layers
        return 2 * self.matmul_parameters * sum(lengths) + attention // (2 if self.causal else 1)


def model_cost(folder: Path) -> ModelCost:
    """Of a model's folder; no weight is loaded."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config)
    products = [
        module.weight.numel()
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name  # the pooler sees one token of a pair
    ]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    causal = hasattr(config, "num_key_value_heads")
    return ModelCost(sum(products), config.num_hidden_layers, head * config.num_attention_heads, causal)


def gemm_shapes(folder: Path, device: str) -> list[tuple[int, int, int]]:
    """The two products of a model's feed-forward layer over many tokens, and a large square one."""
    from transformers import AutoConfig

    config, (rows, side) = AutoConfig.from_pretrained(folder), ROWS[device]
    hidden, inner = config.hidden_size, config.intermediate_size
    return [(rows, hidden, inner), (rows, inner, hidden), (side, side, side)]


def now(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_now(device: str) -> float:
    """CPU seconds of all threads of this process."""
    return time.process_time()


def gemm_rate(
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype,
    device: str,
    seconds: float = 0.3,
    clock: Callable[[str], float] = now,
) -> tuple[float, tuple[int, int, int]]:
    """FLOP per second of the best of `shapes` (rows, inner, columns), and that shape; `seconds` for each."""
    ways = [torch.mm, by_onednn] if device == "cpu" and dtype == torch.float32 else [torch.mm]
    return max((rate_of(shape, dtype, device, seconds, clock, way), shape) for shape in shapes for way in ways)


def by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return product(left, right.T)


def rate_of(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    seconds: float,
    clock: Callable[[str], float] = now,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mm,
) -> float:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype).T  # as the weight of a layer lies
    multiply(left, right)  # the first product is slower: kernels are chosen, memory is touched
    done, took, started = 0, 0.0, clock(device)
    while took < seconds:
        for _ in range(4):
            multiply(left, right)
        done, took = done + 4, clock(device) - started
    return 2 * rows * inner * columns * done / took
