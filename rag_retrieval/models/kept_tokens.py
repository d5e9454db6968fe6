"""Which tokens of a text have a lexical weight, which a token vector, and which are not attended to.

All this is known before a forward, so that torch and an exported graph read the same ones. Nothing here imports torch.
"""

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.text_encoding import TextTemplate
from rag_retrieval.models.token_batch import TokenBatch, concatenated_ranges

if TYPE_CHECKING:
    import torch

Numbers = TypeVar("Numbers", np.ndarray, "torch.Tensor")


def tokens_with_vectors(
    batch: TokenBatch, settings: EmbedderSettings, template: TextTemplate, skiplist: np.ndarray
) -> np.ndarray:
    """[tokens], bool. skiplist: ids of tokens whose vectors documents of a ColBERT lose."""
    if settings.is_colbert:
        return kept_by_colbert(batch, skiplist)
    return kept_by_bge_m3(batch, len(template.prefix), cls_copies(batch, settings.cls_interval, len(template.suffix)))


def kept_by_colbert(batch: TokenBatch, skiplist: np.ndarray) -> np.ndarray:
    """[tokens], bool: all of a query, and of a document those whose ids are not in the skiplist."""
    return np.repeat(batch.is_query, batch.lengths) | ~np.isin(batch.ids, skiplist)


def kept_by_bge_m3(batch: TokenBatch, first: int, copies: np.ndarray) -> np.ndarray:
    """[tokens], bool: all but the `first` tokens of a text and the copies of its cls (`cls_copies`)."""
    return (places_in_texts(batch) >= first) & ~copies


def cls_copies(batch: TokenBatch, cls_interval: int | None, suffix: int) -> np.ndarray:
    """[tokens], bool: the tokens that MCLS adds. suffix: tokens after a text, which are none of them."""
    places = places_in_texts(batch)
    if cls_interval is None:
        return np.zeros(len(places), bool)
    return is_cls_copy(places, np.repeat(batch.lengths, batch.lengths), cls_interval, suffix)


def is_cls_copy(places: Numbers, lengths: Numbers, cls_interval: int, suffix: int) -> Numbers:
    """Of arrays or tensors, bool. places: of each token in its text. lengths: of its text."""
    return (places > 0) & (places % cls_interval == 0) & (places < lengths - suffix)


def places_in_texts(batch: TokenBatch) -> np.ndarray:
    """0, 1, ... of each text: [tokens], int32."""
    return concatenated_ranges(np.zeros_like(batch.lengths), batch.lengths)


def unattended_tokens(batch: TokenBatch, settings: EmbedderSettings) -> np.ndarray | None:
    """[texts], tokens at the end of each text that no token attends to: those that expand queries, where the model was
    trained so; None for none."""
    return None if settings.attend_to_expansion_tokens or not batch.expansion.any() else batch.expansion


class Entries(NamedTuple):
    """The distinct ids of texts, which have one lexical weight each (BGE-M3): text after text, ascending within one.

    ids: [entries], int64. counts: [texts], int64, entries of each. tokens: [tokens], int64, those of the batch that
    count, and entry_of_token: [tokens], int64, the entry of each.
    """

    ids: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    entry_of_token: np.ndarray


def lexical_entries(batch: TokenBatch, left_out: np.ndarray) -> Entries:
    """left_out: ids without an entry."""
    texts = np.repeat(np.arange(len(batch)), batch.lengths)
    tokens = np.flatnonzero(~np.isin(batch.ids, left_out))
    entries, entry_of_token = np.unique(texts[tokens] << 32 | batch.ids[tokens], return_inverse=True)
    return Entries(entries & 0xFFFFFFFF, np.bincount(entries >> 32, minlength=len(batch)), tokens, entry_of_token)
