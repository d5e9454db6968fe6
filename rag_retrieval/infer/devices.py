"""Names of devices and number formats, as a caller writes them, made into torch's own.

What a reader would get wrong: `dtype` is how weights are kept, `precision` how float32 weights are computed with.
Half the memory takes the one, most of the speed either.
"""

import importlib

import torch

from rag_retrieval.models.scoring import check_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"fp32": "no", "no": "no", "bf16": "bf16", "fp16": "fp16"}
ACCELERATORS = ("cuda", "mps", "npu")


def choose_device(name: "str | torch.device | None") -> torch.device:
    """The named device, or the accelerator that torch finds, or the CPU. ValueError for one that is not here."""
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and found.type in ACCELERATORS else torch.device("cpu")
    if str(name).startswith("npu"):
        import_npu()
    device = check_device(name, "device")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: {name} is not on this machine")
    return device


def import_npu() -> None:
    """torch knows Ascend's devices once their package is imported."""
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise ValueError(f"device: npu needs the package torch_npu, which cannot be imported ({error})") from error


def choose_dtype(dtype: "str | torch.dtype | None") -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    return look_up("dtype", DTYPES, dtype)


def choose_precision(precision: str | None) -> str | None:
    return None if precision is None else look_up("precision", PRECISIONS, precision)


def look_up(name: str, table: dict, value):
    if value not in table:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, table))}; found {value!r}")
    return table[value]
