"""The masked language model of an encoder family, whose head is taken apart: what it does to token states, and the
output embedding, so that logits are computed for chosen tokens and in blocks.

    logits = head_states(model, states) W^T + b, with W and b of model.get_output_embeddings()
"""

import torch
from torch.nn.functional import gelu
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from rag_retrieval.models.loading import load_model, reading


def load_masked_lm(
    path: str, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """The model of a folder with its head, weights in float32, and the names of its new parameters: those of the head
    where the folder has none. The output embedding is the input embedding where the family ties them.

    Raises ValueError for a folder that cannot be loaded and for a family whose head is not known here, a decoder's say.
    """
    with reading(f"{path}: the model"):
        family = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).model_type
    if family not in HEADS:
        raise ValueError(f"{path} is a {family}; expected an encoder of one of the families {', '.join(HEADS)}")
    return load_model(AutoModelForMaskedLM, path, None, trust_remote_code, attn_implementation, {})


def head_states(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """What the output embedding takes for states of the last layer: [tokens, hidden] to [tokens, hidden]."""
    return HEADS[model.config.model_type](model, states)


def bert_head(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return model.cls.predictions.transform(states)


def roberta_head(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return model.lm_head.layer_norm(gelu(model.lm_head.dense(states)))


def distilbert_head(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(states)))


def modernbert_head(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return model.head(states)


HEADS = {
    "bert": bert_head,
    "ernie": bert_head,
    "roberta": roberta_head,
    "xlm-roberta": roberta_head,
    "camembert": roberta_head,
    "mpnet": roberta_head,
    "distilbert": distilbert_head,
    "modernbert": modernbert_head,
}
