"""The padding-free forward of a family: backbone over the packed row, head over one vector for each pair.

Which family can do it is not a matter of trust: `packing_problem` compares packed with padded scores when a model
is loaded, and whatever differs, or has no head here, is computed padded.
"""

import inspect
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from rag_retrieval.models.last_layer import read_at_last_layer
from rag_retrieval.models.packed_attention import ATTENTION
from rag_retrieval.models.packing import Packing
from rag_retrieval.models.pair_batch import PairBatch
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.scoring_mode import evaluating

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of scores, relative where they exceed 1
HALF_TOLERANCE = 0.03
NOT_A_MASK = (1, 1, 1, 1)  # a 4-dimensional mask is passed on untouched: the family builds none of its own


def packed_hidden_states(model: PreTrainedModel, batch: PairBatch, packing: Packing, first_position: int):
    """The backbone's last hidden states: [tokens, hidden] of the packed row, or [pairs, hidden] where the last layer
    computes no more (`read_at_last_layer`).

    first_position: the number that the family gives to a pair's first token.
    """
    backbone = getattr(model, model.base_model_prefix)
    inputs = {
        "input_ids": packing.select(batch.token_ids),
        "position_ids": packing.positions[None] + first_position,
        "attention_mask": torch.zeros(NOT_A_MASK, device=batch.token_ids.device),
        "packing": packing,
    }
    accepted = inspect.signature(backbone.forward).parameters
    if "token_type_ids" in accepted:  # left out, some families look up a table as long as one pair
        types = torch.zeros_like(batch.token_ids) if batch.token_types is None else batch.token_types
        inputs["token_type_ids"] = packing.select(types)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return backbone(**inputs).last_hidden_state[0]


def read_states(hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The states that the head reads: [pairs, hidden]."""
    # one state for each pair is what the last layer gave, or what pairs of one token have anyway
    return hidden if len(hidden) == len(packing.read) else hidden[packing.read]


def pooler_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    pooled = getattr(model, model.base_model_prefix).pooler(read_states(hidden, packing)[:, None])
    return model.classifier(model.dropout(pooled))


def first_token_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    return model.classifier(read_states(hidden, packing)[:, None])  # it takes the first of a row's tokens itself


def modernbert_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    if model.config.classifier_pooling == "cls":
        pooled = read_states(hidden, packing)
    else:
        pooled = torch.stack([pair.mean(dim=0) for pair in hidden.split(packing.lengths)])
    return model.classifier(model.drop(model.head(pooled)))


def last_token_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    return model.score(read_states(hidden, packing))


Head = Callable[[PreTrainedModel, torch.Tensor, Packing], torch.Tensor]

ENCODER_HEADS: dict[str, Head] = {
    "bert": pooler_head,
    "roberta": first_token_head,
    "xlm-roberta": first_token_head,
    "camembert": first_token_head,
    "electra": first_token_head,
    "modernbert": modernbert_head,
}


def packing_problem(
    model: PreTrainedModel,
    padded_scores: Callable[[PairBatch], torch.Tensor],
    packed_scores: Callable[[PairBatch], torch.Tensor],
    batch: PairBatch,
    half_tolerance: float = HALF_TOLERANCE,
) -> str | None:
    """Why this model cannot be packed, or None: then it has been given our attention function and last layer.

    Compares both scores of `batch`, whose pairs should differ in length, share a query, and exceed a sliding window
    where the model has one. half_tolerance: of scores of a model in half precision, relative where they exceed 1. The
    model is left in its mode; no random number is drawn.
    """
    own = model.config._attn_implementation
    problem = "its attention cannot be replaced"
    with evaluating(model):
        expected = padded_scores(batch)
        try:
            model.set_attn_implementation(ATTENTION)
            read_at_last_layer(model)
            if model.config._attn_implementation == ATTENTION:
                problem = difference(expected, packed_scores(batch), model.dtype, half_tolerance)
        except Exception as error:  # whatever a family's own code raises when it is called in another way
            problem = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
    if problem is not None:
        model.set_attn_implementation(own)
    return problem


def attention_dropout(model: PreTrainedModel) -> float:
    """The rate of dropout on attention weights that the config asks for, under either of its two names."""
    config = model.config.get_text_config()
    return getattr(config, "attention_probs_dropout_prob", None) or getattr(config, "attention_dropout", None) or 0.0


def pairs_to_check(model: PreTrainedModel, encoder: PairEncoder) -> list[EncodedPair]:
    """Pairs for `packing_problem`: the last is longer than a sliding window, if there is one within max_length.

    Their tokens come from all over the vocabulary: of a text of our own a tokenizer may know no word.
    """
    config = model.config.get_text_config()
    window = getattr(config, "local_attention", None) or getattr(config, "sliding_window", None) or 0
    tokens = 2 * window if window < encoder.max_length else 0  # half a window to each side, in some families
    special, size = set(encoder.tokenizer.all_special_ids), min(len(encoder.tokenizer), config.vocab_size)
    ordinary = [token for token in range(0, size, max(1, size // 1000)) if token not in special]

    def ids(first: int, count: int) -> list[int]:
        return [ordinary[(first + 7 * place) % len(ordinary)] for place in range(count)]

    return [encoder.join(ids(*query), ids(*document)) for query, document in (
        ((1, 1), (0, 0)),
        ((2, 2), (3, 5)),
        ((2, 2), (5, tokens + 9)),
    )]  # fmt: skip


def difference(
    expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype, half_tolerance: float = HALF_TOLERANCE
) -> str | None:
    tolerance = TOLERANCE.get(dtype, half_tolerance) * max(1.0, expected.abs().max().item())
    largest = (expected - found).abs().max().item()
    if not largest <= tolerance:  # NaN too
        return f"packed scores differ from padded ones by {largest:.2g}"
    if expected.max() - expected.min() <= tolerance:
        return "all pairs get the same score, so that packing cannot be checked"
    return None
