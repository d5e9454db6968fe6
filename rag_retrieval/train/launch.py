"""From what the launcher set up to one group of processes that train together.

`accelerate launch` starts processes and hands them settings through the environment. On a machine without an
accelerator, accelerate 1.15 takes FSDP and multi-GPU settings to mean single processes that do not know of
each other: N silent copies. Here such a launch becomes plain data parallelism on the CPU, and says so.
"""

import logging
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rag_retrieval.core.log import launched_processes
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.run_folder import TRACKER_FOLDER

logger = logging.getLogger(__name__)


class LaunchError(RuntimeError):
    """The launcher's settings and the machine or the configuration do not fit."""


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of a run. Raises LaunchError when accelerate's settings contradict the configuration or when the
    processes that were started do not form one group."""
    check_precision(config.mixed_precision)
    own_accumulation(config.gradient_accumulation_steps)
    check_fsdp_version()
    backend = None if torch.accelerator.is_available() else adapt_to_cpu()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.log_with,
        project_config=ProjectConfiguration(config.output_dir, f"{config.output_dir}/{TRACKER_FOLDER}"),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=config.wait_minutes)),
        ],
    )
    check_one_group(accelerator.num_processes)
    if accelerator.state.deepspeed_plugin is not None:
        theirs = accelerator.state.deepspeed_plugin.deepspeed_config
        check_deepspeed(theirs, config)
        set_up_deepspeed(theirs, config)
    return accelerator


# --- settings that accelerate has too ---


def check_same(key: str, ours: object, theirs: object, source: str) -> None:
    if ours != theirs:
        raise LaunchError(
            f"{key} is {ours} in the training configuration but {theirs} in accelerate's settings ({source}); "
            "make them equal, or leave it out of accelerate's"
        )


def check_precision(mixed_precision: str) -> None:
    """A launcher that says nothing of the precision passes "no"."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher != "no":
        check_same("mixed_precision", mixed_precision, launcher, "its --config_file or --mixed_precision")
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise LaunchError("mixed_precision fp16 needs a GPU, and none was found; use bf16 or no")


def own_accumulation(accumulation: int) -> None:
    """The loop divides by the items of the whole step; accelerate must not divide once more. A launcher that says
    nothing of it passes 1."""
    given = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if given not in ("1", "auto"):
        source = "its --config_file or --gradient_accumulation_steps"
        check_same("gradient_accumulation_steps", str(accumulation), given, source)
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"


def check_deepspeed(theirs: dict, config: TrainingConfig) -> None:
    """What stands in DeepSpeed's own file, or in deepspeed_config, and is not left to the training configuration.

    An accumulation of 1 is what accelerate writes there where nothing was said.
    """
    source = "its deepspeed_config or deepspeed_config_file"
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", config.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm or 0.0),
    }
    for key, (name, value) in ours.items():
        given = theirs.get(key, "auto")
        if given != "auto" and (key, given) != ("gradient_accumulation_steps", 1):
            check_same(name if name == key else f"{name} ({key})", value, given, source)
    for precision in ("bf16", "fp16"):
        if theirs.get(precision, {}).get("enabled") is True:
            check_same("mixed_precision", config.mixed_precision, precision, source)


def set_up_deepspeed(theirs: dict, config: TrainingConfig) -> None:
    """Tell DeepSpeed, before it takes the model, what it does by itself: clip, and gather ZeRO-3's weights
    for saving. The other numbers accelerate would take from a data loader."""
    theirs |= {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm or 0.0,
    }
    theirs["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if theirs.get("bf16", {}).get("enabled"):
        # DeepSpeed's own bf16 turns the weights of the model, and of every saved one, into bf16; and by itself its
        # autocast averages the gradients of linear layers in bf16, which in 5 tiny steps moves a loss by 1 percent
        theirs["bf16"] = {"enabled": False}
        theirs["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    # else transformers loads any model in step with all processes, and the first one merges an adapter alone
    unset_hf_deepspeed_config()


def check_wrapped_layers(model: PreTrainedModel) -> None:
    """FSDP wraps the layers that accelerate's file names, and where it names none those that the model names.

    Raises LaunchError, also where data parallelism stands in for FSDP, for names of another family.
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    present = {type(module).__name__ for module in model.modules()}
    missing = [name for name in named.split(",") if name and name not in present]
    if missing:
        own = ", ".join(sorted(model._no_split_modules or ())) or "none by name"
        raise LaunchError(
            f"fsdp_transformer_layer_cls_to_wrap is {named} in accelerate's settings, but a {type(model).__name__} has "
            f"no {' and no '.join(missing)}; its own are {own}. Take the key out, as config/default_fsdp.yaml does: "
            "the layers then follow the model"
        )


def check_fsdp_version() -> None:
    """accelerate takes FSDP1, which torch gives up, where a file does not say 2."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise LaunchError(
            "accelerate's settings ask for FSDP1; say fsdp_version: 2 in fsdp_config, as config/default_fsdp.yaml does"
        )


def autocast_under_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """Before `prepare`: half precision under FSDP2 as under every other engine, by autocast, with float32 weights,
    gradients and scores. By itself accelerate has FSDP2 compute in half precision throughout, average gradients in
    it, and return it. The price: weights travel in float32, and without gradient checkpointing autocast's copies of
    them, 2 bytes per parameter of the whole model, live until the backward."""
    if not accelerator.is_fsdp2 or accelerator.mixed_precision == "no":
        return
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
    model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


# --- processes ---


def adapt_to_cpu() -> str | None:
    """Without an accelerator: DeepSpeed over gloo, everything else as data parallelism on the CPU.

    Returns the backend to ask for, None for accelerate's choice.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "gloo"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        logger.warning("no accelerator found: training with data parallelism on the CPU instead of FSDP")
    if launched_processes() > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return None


def check_one_group(processes: int) -> None:
    """Raises LaunchError unless all that the launcher was asked to start train together."""
    started = launched_processes()
    if started != processes:
        raise LaunchError(
            f"the launcher started {started} processes but accelerate sees {processes}: they would train "
            "separate copies. On CPUs launch with torchrun --nproc_per_node N; on GPUs check num_processes "
            "and gpu_ids"
        )
    # accelerate launch sets MASTER_ADDR where several were asked for, but some settings make it start one alone
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            "accelerate launch was asked for several processes (it set MASTER_ADDR) but started one. It does so for "
            "distributed_type MULTI_CPU or NO, and with --cpu: take --config_file config/ddp.yaml, with or without "
            "GPUs, or torchrun --nproc_per_node N. For one process say --num_processes 1 and unset MASTER_ADDR"
        )
