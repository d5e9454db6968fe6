"""AdamW with the right parameters in the right groups.

Weight decay goes by module type, not by parameter name: biases and the weights of norms get none, whatever
they are called. New parameters (a fresh head) learn at their own, larger rate.
"""

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
                yield {
                    "params": members,
                    "lr": new_lr if new else lr,
                    "weight_decay": weight_decay if decay else 0.0,
                }


def make_adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=devices <= FUSED_DEVICES)
