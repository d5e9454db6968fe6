"""The three representations that one forward of an embedding model gives for a batch of texts.

    dense          one vector for a text; the score of a pair is their cosine or product
    lexical        a weight for each token id of a text; the score is the sum over common ids of w_q w_d
    multi_vector   a vector for each token; the score is the sum over a query's vectors of the largest product with one
                   of the document's (MaxSim of ColBERT, https://arxiv.org/abs/2004.12832)

They are NamedTuples, which DDP, FSDP, DeepSpeed and accelerate pass through with the gradients of their tensors.
Nothing here imports torch.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Representation = Literal["dense", "lexical", "multi_vector"]
DENSE, LEXICAL, MULTI_VECTOR = "dense", "lexical", "multi_vector"
REPRESENTATIONS: tuple[Representation, ...] = (DENSE, LEXICAL, MULTI_VECTOR)


class Lexical(NamedTuple):
    """Text after text; within a text by ascending id, each id once.

    ids: [entries], int64, token ids. weights: [entries], float32, at least 0. counts: [texts], int64, entries of each
    text; 0 for a text without any.
    """

    ids: "Tensor"
    weights: "Tensor"
    counts: "Tensor"


class TokenVectors(NamedTuple):
    """Text after text, in the order of the tokens that are kept.

    vectors: [tokens kept, width], float32, of length 1 (a vector of zeros stays). counts: [texts], int64, vectors of
    each text.
    """

    vectors: "Tensor"
    counts: "Tensor"


class Representations(NamedTuple):
    """Of one batch of texts; None for a representation that the model does not have or was not asked for.

    dense: [texts, dim], float32, not normalized. All tensors are on the model's device.
    """

    dense: "Tensor | None" = None
    lexical: Lexical | None = None
    multi_vector: TokenVectors | None = None
