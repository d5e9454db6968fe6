"""The forwards of a validation, of whatever trainer."""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rag_retrieval.models.token_batch import TokenBatch, texts_of
from rag_retrieval.train.failures import is_out_of_memory
from rag_retrieval.train.step_checks import WHOLE

logger = logging.getLogger(__name__)


def forward_in_memory(model: nn.Module, batch: TokenBatch, accelerator: Accelerator) -> list[Any]:
    """What the model gives for a batch, in the forwards that it took, one after another. A batch that does not fit in
    memory is halved, unless the forwards of all processes belong together, or it has one text."""
    try:
        return [model(batch)]
    except RuntimeError as error:
        whole = accelerator.distributed_type in WHOLE
        if not (is_out_of_memory(error) and whole and len(batch) > 1):
            raise
    # not in the handler, where the traceback still holds the activations
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    logger.warning("validation: %d texts do not fit in memory at once, continuing with halves", len(batch))
    halves = (texts_of(batch, 0, middle), texts_of(batch, middle, len(batch)))
    return [result for half in halves for result in forward_in_memory(model, half, accelerator)]
