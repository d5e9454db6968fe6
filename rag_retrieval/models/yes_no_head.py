"""The score of a causal model that answers yes or no: two rows of its output embedding, at the last token.

    score = logit(yes) - logit(no), so that sigmoid(score) = P(yes | yes or no)

(Nogueira et al., Document Ranking with a Pretrained Sequence-to-Sequence Model, 2020, use the same two tokens.)

What a reader would get wrong: the output embedding stays a whole matrix, tied to the input's or not, and is saved
as such; only the product is cut down to two rows. It is cut inside the module's forward, because engines that shard
a model gather a module's weights when it is called.
"""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from rag_retrieval.models.packed_model import pooled_states
from rag_retrieval.models.packing import Packing
from rag_retrieval.models.scoring import evaluating

# Of a logit difference, relative where it exceeds 1. Logits are of order 20, and half precision rounds the states
# that they are made of to one part in 256: SmolLM2-135M in bfloat16, packed and padded, differs by 0.04.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.12


def restrict_lm_head_to_tokens(model: PreTrainedModel, tokens: tuple[int, int | None], sample: list[int]) -> None:
    """Let the model's output embedding give the logits of two tokens, (yes, no), and no other.

    Without a token for no its logit is 0, and the score that of yes alone.

    sample: token ids of one pair. Raises ValueError for a model without an output embedding, and for a family whose
    own forward does something to the logits that is not known here, as it does with the sample's.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"a {type(model).__name__} has no output embedding to read yes and no from; use head: scalar")
    head.forward = partial(two_logits, head, *tokens)  # a partial is copied with its layer, for other devices
    ids = torch.tensor([sample], device=head.weight.device)
    with evaluating(model):
        own = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        backbone = getattr(model, model.base_model_prefix)
        score = yes_no_scores(model, backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1:])
    half = head.weight.dtype in (torch.bfloat16, torch.float16)
    tolerance = (HALF_TOLERANCE if half else TOLERANCE) * max(1.0, score.abs().item())
    if not (own[0] - own[1] - score).abs() <= tolerance:
        raise ValueError(
            f"a {type(model).__name__} changes its logits in a way that is not known here (its yes minus no is "
            f"{own[0] - own[1]:.4g}, ours {score.item():.4g}); use head: scalar"
        )


def two_logits(head: nn.Linear, yes: int, no: int | None, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [..., width]. Returns [..., 2], float32 whatever the autocast: half precision would tie documents."""
    rows = two_rows(head.weight, yes, no)
    bias = None if head.bias is None else two_rows(head.bias, yes, no)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), rows, bias)


def two_rows(values: torch.Tensor, yes: int, no: int | None) -> torch.Tensor:
    """values: [vocabulary, ...]. Returns [2, ...], float32; zeros for a token that is not read."""
    return torch.stack((values[yes], torch.zeros_like(values[yes]) if no is None else values[no])).float()


def yes_no_scores(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [pairs, width], at the last token. Returns [pairs], float32."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits[:, 0] - logits[:, 1]


def yes_no_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    return yes_no_scores(model, pooled_states(hidden, packing))
