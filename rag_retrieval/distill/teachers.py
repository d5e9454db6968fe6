"""Teachers: rerankers, and causal language models that are asked yes or no. Their scores are logits.

The score of several is the mean of their logits: that of probabilities would lose what a teacher that is sure says
about the order of documents, since sigmoid(9) and sigmoid(12) are both nearly 1. The price: a teacher whose logits
are larger counts for more.
"""

import numpy as np
import torch

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.infer.open_backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.models.settings import YES_NO_NAMES


class TeacherError(CommandFailure):
    """A teacher gave what nobody can learn from."""


def load_teachers(config: DistillConfig, device: torch.device) -> list[Reranker]:
    """Raises ValueError for a folder that is no teacher: damaged, without a trained head, without a chat template,
    or with a tokenizer that has no single token for an answer."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return [load_teacher(name, config, device) for name in config.teachers]


def load_teacher(name: str, config: DistillConfig, device: torch.device) -> Reranker:
    """A reranker as its folder says it is asked; any other language model is asked the configuration's question."""
    # what belongs to the question changes no teacher that has one of its own
    options = config.model_options().model_copy(update=dict.fromkeys(YES_NO_NAMES))
    if options.device is None and options.devices is None:
        options = options.model_copy(update={"device": str(device)})
    try:
        return Reranker.from_backend(open_backend(name, options, config.question))
    except ValueError as error:
        raise ValueError(f"teachers: {error}") from error


def mean_logits(teachers: list[Reranker], pairs: list[tuple[str, str]], batch_size: int) -> np.ndarray:
    """[pairs], float32. Raises TeacherError where a score is not finite."""
    scores = []
    for teacher in teachers:
        try:
            scores.append(teacher.compute_score(pairs, batch_size).astype(np.float64))
        except ValueError as error:
            first = f"in the pairs from the query {pairs[0][0][:60]!r} on"
            raise TeacherError(f"teacher {teacher.backend.name}, {first}: {error}") from error
    return np.mean(scores, axis=0).astype(np.float32)
