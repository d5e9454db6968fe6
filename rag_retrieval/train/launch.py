"""From what the launcher set up to one group of processes that train together.

`accelerate launch` starts processes and hands them settings through the environment. On a machine without an
accelerator, accelerate 1.15 takes FSDP and multi-GPU settings to mean single processes that do not know of each
other: N silent copies. Here such a launch becomes plain data parallelism on the CPU, and says so.
"""

import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

logger = logging.getLogger(__name__)


class LaunchError(RuntimeError):
    """The launcher's settings and the machine or the configuration do not fit."""


def build_accelerator(mixed_precision: str, log_with: str | None, output_dir: Path) -> Accelerator:
    """The Accelerator of this run. Raises LaunchError when settings contradict each other or when the processes
    that were started do not form one group."""
    check_precision(mixed_precision)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if not torch.accelerator.is_available():
        handlers += adapt_to_cpu()
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=log_with,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=handlers,
    )
    check_one_group(accelerator.num_processes)
    return accelerator


def check_precision(mixed_precision: str) -> None:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", mixed_precision):
        raise LaunchError(
            f"mixed_precision is {mixed_precision} in the configuration but {launcher} in accelerate's settings "
            "(its --config_file or --mixed_precision); make them equal"
        )
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise LaunchError("mixed_precision fp16 needs a GPU, and none was found; use bf16 or no")


def adapt_to_cpu() -> list:
    """Without an accelerator: DeepSpeed over gloo, everything else as data parallelism on the CPU."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return [InitProcessGroupKwargs(backend="gloo")]
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        if os.environ.get("RANK", "0") == "0":
            logger.warning("no accelerator found: training with data parallelism on the CPU instead of FSDP")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return []


def check_one_group(processes: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise LaunchError(
            f"the launcher started {started} processes but accelerate sees {processes}: they would train separate "
            "copies. On CPUs launch with torchrun --nproc_per_node N; on GPUs check num_processes and gpu_ids"
        )
