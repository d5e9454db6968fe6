"""From what the launcher set up to one group of processes that train together.

`accelerate launch` starts processes and hands them settings through the environment. On a machine without an
accelerator, accelerate 1.15 takes FSDP and multi-GPU settings to mean single processes that do not know of
each other: N silent copies. Here such a launch becomes plain data parallelism on the CPU, and says so.
"""

import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rag_retrieval.train.run_folder import TRACKER_FOLDER

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=3)  # processes wait for the one that reads data or writes a large model


class LaunchError(RuntimeError):
    """The launcher's settings and the machine or the configuration do not fit."""


def build_accelerator(
    mixed_precision: str, log_with: str | None, output_dir: Path, batch_size: int, max_grad_norm: float | None
) -> Accelerator:
    """The Accelerator of this run. batch_size: records per micro-batch and process.

    Raises LaunchError when settings contradict each other or when the processes that were started do not form
    one group.
    """
    check_precision(mixed_precision)
    own_accumulation()
    backend = None if torch.accelerator.is_available() else adapt_to_cpu()
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=log_with,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / TRACKER_FOLDER)
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(backend=backend, timeout=PATIENCE),
        ],
    )
    check_one_group(accelerator.num_processes)
    if accelerator.state.deepspeed_plugin is not None:
        set_up_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, batch_size, max_grad_norm)
    return accelerator


def set_up_deepspeed(config: dict, batch_size: int, max_grad_norm: float | None) -> None:
    """Tell DeepSpeed, before it takes the model, what it does by itself: clip, and gather ZeRO-3's weights
    for saving. The other numbers accelerate would take from a data loader."""
    config |= {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
    }
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if config.get("bf16", {}).get("enabled"):
        # DeepSpeed's own bf16 turns the weights of the model, and of every saved one, into bf16
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    # else transformers loads any model in step with all processes, and the first one merges an adapter alone
    unset_hf_deepspeed_config()


def check_precision(mixed_precision: str) -> None:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", mixed_precision):
        raise LaunchError(
            f"mixed_precision is {mixed_precision} in the configuration but {launcher} in accelerate's "
            "settings (its --config_file or --mixed_precision); make them equal"
        )
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise LaunchError("mixed_precision fp16 needs a GPU, and none was found; use bf16 or no")


def own_accumulation() -> None:
    """The loop divides by the items of the whole step; accelerate must not divide once more."""
    given = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if given != "1":
        logger.warning(
            "gradient_accumulation_steps %s of accelerate's settings is not used; the training YAML decides",
            given,
        )
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"


def adapt_to_cpu() -> str | None:
    """Without an accelerator: DeepSpeed over gloo, everything else as data parallelism on the CPU.

    Returns the backend to ask for, None for accelerate's choice.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "gloo"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        logger.warning("no accelerator found: training with data parallelism on the CPU instead of FSDP")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return None


def check_one_group(processes: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise LaunchError(
            f"the launcher started {started} processes but accelerate sees {processes}: they would train "
            "separate copies. On CPUs launch with torchrun --nproc_per_node N; on GPUs check num_processes "
            "and gpu_ids"
        )
