"""Token vectors: a vector for each token of a text that is kept, for late interaction, in two styles.

    ColBERT   where token vectors are all that a model gives (https://arxiv.org/abs/2004.12832). Queries are filled up
              to their maximum length with mask tokens, which have vectors too (query expansion); documents lose the
              vectors of punctuation (skiplist). The score of a pair is a sum over the query's vectors.
    BGE-M3    beside dense vectors or lexical weights (https://arxiv.org/abs/2402.03216, section 3.1). The first token,
              whose state is the dense vector, has none. The score is a mean over the query's vectors.

A vector is the projection of the token's state, made to length 1 in float32. `kept_tokens` says which tokens have one.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from rag_retrieval.models.packing import on_device
from rag_retrieval.models.representation_files import COLBERT_PROMPTS
from rag_retrieval.models.representations import TokenVectors
from rag_retrieval.models.token_batch import TokenBatch

logger = logging.getLogger(__name__)


def token_vectors(states: torch.Tensor, projection: nn.Module, batch: TokenBatch, kept: np.ndarray) -> TokenVectors:
    """states: [tokens, hidden], text after text. kept: [tokens], bool."""
    texts = np.repeat(np.arange(len(batch)), batch.lengths)
    counts = np.bincount(texts[kept], minlength=len(batch))
    vectors = projection(states[on_device(np.flatnonzero(kept), states.device)])
    return TokenVectors(normalize(vectors.float(), dim=-1), on_device(counts, states.device))


# ---- the tokenizer of ColBERT ---------------------------------------------------------------------------


def expansion_token(path: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that fills up queries: the mask token, of a tokenizer without one the eos token."""
    token = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ValueError(f"{path}: its tokenizer has no mask and no eos token; leave query_expansion out")
    return token


def skiplist_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> np.ndarray:
    """Ids of the words that are one token; a warning names the others, which documents keep."""
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    no_token = (None, tokenizer.unk_token_id)
    unknown = [word for word, token in ids.items() if token in no_token and word != tokenizer.unk_token]
    if unknown:
        logger.warning("skiplist_words: not one token of this tokenizer, and not left out: %s", " ".join(unknown))
    return np.array([token for word, token in ids.items() if word not in unknown], np.int32)


def keep_prompts_whole(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """Let a prompt whose text, or first word, is a token of the vocabulary be read as that token ("[unused0]", "[Q] "),
    as other libraries insert it."""
    vocabulary = tokenizer.get_vocab()
    for prompt in filter(str.strip, prompts):
        token = next((text for text in (prompt, prompt.split()[0]) if text in vocabulary), None)
        if token is not None and tokenizer.tokenize(token) != [token]:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)


@torch.no_grad()
def add_prompt_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """Add those of ColBERT's prompts to the vocabulary that are not in it: PyLate inserts them as tokens.

    The embedding of a new token is the mean of those that its text has had so far.
    """
    new = [prompt for prompt in prompts if prompt in COLBERT_PROMPTS.values() and prompt not in tokenizer.get_vocab()]
    if not new:
        return
    before = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in new]
    tokenizer.add_tokens([AddedToken(prompt, normalized=False, special=True) for prompt in new], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = model.get_input_embeddings().weight
    for prompt, ids in zip(new, before, strict=True):
        rows[tokenizer.convert_tokens_to_ids(prompt)] = rows[ids].mean(dim=0)
    logger.info("tokens added to the vocabulary: %s", ", ".join(map(repr, new)))
