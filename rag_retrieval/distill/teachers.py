"""Teachers: rerankers, and causal language models that are asked yes or no. Their scores are logits.

The score of several is the mean of their logits: that of probabilities would lose what a teacher that is sure says
about the order of documents, since sigmoid(9) and sigmoid(12) are both nearly 1. The price: a teacher whose logits
are larger counts for more.
"""

import torch
from transformers import AutoConfig

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.models.decoder_template import INSTRUCTION
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.load_reranker import CLASSES, model_type_of
from rag_retrieval.models.model_files import read_settings, resolve_model_path
from rag_retrieval.models.model_loading import load_tokenizer, reading
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.yes_no_prompt import chat_formats


class TeacherError(CommandFailure):
    """A teacher gave what nobody can learn from."""


def load_teachers(config: DistillConfig, device: torch.device) -> list[PairScorer]:
    """Raises ValueError for a folder that is no teacher: damaged, without a trained head, without a chat template,
    or with a tokenizer that has no single token for an answer."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return [load_teacher(name, config).to(device).eval() for name in config.teachers]


def load_teacher(name: str, config: DistillConfig) -> PairScorer:
    path = resolve_model_path(name)
    options = {
        "max_length": config.max_len,
        "dtype": getattr(torch, config.dtype),
        "trust_remote_code": config.trust_remote_code,
    }
    if read_settings(path) is None and is_language_model(path, config.trust_remote_code):
        return load_language_model(path, config, options)
    teacher = CLASSES[model_type_of(path)].from_pretrained(path, **options)
    if teacher.new_parameters:
        raise ValueError(
            f"teachers: {path} has no trained {', '.join(sorted(teacher.new_parameters))}, so its scores mean nothing; "
            "give a trained reranker or a causal language model"
        )
    return teacher


def is_language_model(path: str, trust_remote_code: bool) -> bool:
    """Whether a checkpoint that was not saved by this library was saved as a causal language model."""
    with reading(f"{path}: the model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def load_language_model(path: str, config: DistillConfig, options: dict) -> LLMDecoder:
    tokenizer = load_tokenizer(path, config.trust_remote_code)
    has_instruction = INSTRUCTION in config.system + config.prompt
    try:
        formats = chat_formats(tokenizer, config.system, config.prompt)
        return LLMDecoder.from_pretrained(
            path,
            head="yes_no",
            instruction=config.instruction if has_instruction else None,
            yes_token=config.yes_token,
            no_token=config.no_token,
            **formats,
            **options,
        )
    except ValueError as error:
        raise ValueError(f"teachers: {path}: {error}") from error


def mean_logits(teachers: list[PairScorer], pairs: list[tuple[str, str]], batch_size: int) -> torch.Tensor:
    """[pairs], float32, on the CPU. Raises TeacherError where a score is not finite."""
    scores = torch.stack([teacher.compute_score(pairs, batch_size, show_progress_bar=False) for teacher in teachers])
    for teacher, own in zip(teachers, scores, strict=True):
        broken = (~own.isfinite()).nonzero()
        if len(broken):
            place = int(broken[0])
            raise TeacherError(
                f"a teacher ({teacher.model.name_or_path}) gave the score {own[place].item()} to the query "
                f"{pairs[place][0][:60]!r}; use dtype float32, or another teacher"
            )
    return scores.double().mean(dim=0).float()
