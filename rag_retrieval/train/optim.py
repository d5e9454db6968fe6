"""AdamW with the right parameters in the right groups, and the learning rate as a function of the optimizer step.

Weight decay goes by module type, not by parameter name: biases and the weights of norms get none, whatever they are
called. New parameters (a fresh head) learn at their own, larger rate. A step is one optimizer update, never a
micro-batch, and `step` is the number of updates already done: update number n (from 0) runs with the factor of step n.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu"}


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises: torch's norms, or a family's own class such as Qwen2RMSNorm."""
    known = (*ALL_LAYERNORM_LAYERS, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def without_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that get no weight decay: every bias, and everything in a norm."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or is_norm(module)
    }


def parameter_groups(
    model: nn.Module, lr: float, new_lr: float, new_parameters: set[str], weight_decay: float
) -> Iterator[dict]:
    """Up to four groups: body or new parameters, with or without decay. Frozen parameters are in none."""
    no_decay = without_decay(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for new in (False, True):
        for decay in (True, False):
            members = [
                parameter
                for name, parameter in trainable
                if (name in new_parameters) == new and (name not in no_decay) == decay
            ]
            if members:
                yield {"params": members, "lr": new_lr if new else lr, "weight_decay": weight_decay if decay else 0.0}


def make_adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=devices <= FUSED_DEVICES)


def warmup_stable_cosine(step: int, total_steps: int, warmup_proportion: float, stable_proportion: float) -> float:
    """The factor in [0, 1] by which the peak learning rate is multiplied at `step`.

    With W = round(warmup_proportion * total_steps) and
    D = round((warmup_proportion + stable_proportion) * total_steps), rounded half to even as Python does:

        0 <= step < W            (step + 1) / W; the first update already moves, the last of them is at 1
        W <= step < D            1
        D <= step < total_steps  (1 + cos(pi (step - D) / (total_steps - D))) / 2; starts at 1
        step == total_steps      0; nothing is left, also where the proportions add up to 1

    step: optimizer steps done, 0 to total_steps. total_steps: optimizer steps of the whole run, at least 1.
    Both proportions are fractions in [0, 1] of total_steps and add up to at most 1.
    """
    assert 0 <= step <= total_steps, "a step past the end is a miscounted run: a cosine would silently climb again"
    warmup_end = round(warmup_proportion * total_steps)
    decay_start = round((warmup_proportion + stable_proportion) * total_steps)
    if step == total_steps:
        return 0.0
    if step < warmup_end:
        return (step + 1) / warmup_end
    if step < decay_start:
        return 1.0
    return (1.0 + math.cos(math.pi * (step - decay_start) / (total_steps - decay_start))) / 2.0
