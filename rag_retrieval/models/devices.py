"""Names of devices and number formats, as a caller writes them, made into torch's own.

`dtype` is the format of the weights, `precision` that of the computation with float32 weights. A half-precision dtype
halves the memory; most of the speed comes with either.
"""

import importlib
from collections.abc import Sequence

import torch

from rag_retrieval.models.options import number_format

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACCELERATORS = ("cuda", "mps", "npu")


def check_devices(devices: Sequence[str | torch.device]) -> list[torch.device]:
    """Raises ValueError for a name instead of a list, an empty list, and a device that this machine lacks."""
    if isinstance(devices, (str, torch.device)) or not devices:
        raise ValueError(f'devices must be a list such as ["cuda:0", "cuda:1"]; found {devices!r}')
    return [check_device(device) for device in devices]


def check_device(name: str | torch.device, argument: str = "devices") -> torch.device:
    """argument: what the error calls it. Raises ValueError for a device that this machine lacks."""
    if str(name).startswith("npu"):
        import_npu(argument)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{argument}: {name!r} is no device of torch: {error}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{argument}: {device} is not on this machine, which has {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{argument}: {device} is not on this machine")
    if device.type == "meta":
        raise ValueError(f"{argument}: meta keeps no weights, so that it can compute nothing")
    return device


def choose_device(name: "str | torch.device | None") -> torch.device:
    """The named device, or the accelerator that torch finds, or the CPU. ValueError for one that is not here."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator and accelerator.type in ACCELERATORS else torch.device("cpu")
    return check_device(name, "device")


def import_npu(argument: str) -> None:
    """torch knows Ascend's devices once their package is imported."""
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise ValueError(f"{argument}: npu needs the package torch_npu, which cannot be imported ({error})") from error


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Of weights, by any of its names. ValueError for another one."""
    name = number_format(dtype)
    if name not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}")
    return DTYPES.get(name)


def choose_precision(precision: str | None) -> str | None:
    """As autocast is asked for: "no" for fp32."""
    return "no" if precision == "fp32" else precision
