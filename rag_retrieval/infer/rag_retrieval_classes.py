"""RAG-Retrieval's classes for embedding models, with the methods that they have there."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.representations import MULTI_VECTOR

if TYPE_CHECKING:
    import torch


class Embedding:
    """RAG-Retrieval's class for embedding models, with its methods: `Embedding.from_pretrained(path).encode(texts)`.

    Vectors are tensors, no prompt of the model is added, and its own maximum length does not count. Use `Embedder`.
    """

    def __init__(self, embedder: Embedder):
        self.embedder = embedder

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        use_mrl: bool = False,
        mrl_dims: Sequence[int] = (),
        temperature: float = 0.02,
        all_gather: bool = False,
        device: "str | torch.device | None" = None,
    ) -> "Embedding":
        """use_mrl, mrl_dims, temperature, all_gather: of training there, without effect here. Raises as `Embedder`."""
        return cls(Embedder(model_name_or_path, device=device))

    def to(self, device: "str | torch.device") -> "Embedding":
        move(self.embedder, device)
        return self

    def encode(
        self,
        sentences: Sequence[str],
        device: "str | torch.device | None" = None,
        max_len: int | None = None,
        batch_size: int = 512,
        prompt: str = "",
    ) -> "torch.Tensor":
        """Vectors in the order given: [sentences, dim], float32, on the CPU, of length 1 where the model says so.

        device: where the model is moved before; None leaves it. max_len: tokens of a text, default 512 or the model's
        limit. batch_size: texts of one forward at most. prompt: text before each. Raises ValueError as `Embedder`.
        """
        import torch

        from rag_retrieval.models.loading import DEFAULT_MAX_LENGTH

        if device is not None:
            self.to(device)
        if max_len is None:
            max_len = min(DEFAULT_MAX_LENGTH, self.embedder.backend.limit or DEFAULT_MAX_LENGTH)
        return torch.from_numpy(self.embedder.encode(sentences, prompt, max_length=max_len, batch_size=batch_size))


class ColBERT:
    """RAG-Retrieval's class for late interaction: `ColBERT.from_pretrained(path).compute_score(pairs)`.

    It takes any folder with token vectors. Use `Reranker`, which ranks by them, or `Embedder`.
    """

    def __init__(self, embedder: Embedder):
        self.embedder = embedder

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        colbert_dim: int | None = None,
        cuda_device: "str | torch.device" = "cpu",
        mask_punctuation: bool = True,
        temperature: float = 0.02,
    ) -> "ColBERT":
        """colbert_dim: numbers in a token vector; of another model ValueError; None takes any. cuda_device: where the
        model computes. mask_punctuation, temperature: without effect on scores there and here. Raises as `Embedder`,
        and ValueError for a model without token vectors, whose scores would be random."""
        embedder = Embedder(model_name_or_path, device=cuda_device)
        own = embedder.settings.representations
        if MULTI_VECTOR not in own:
            raise ValueError(f"{model_name_or_path}: it gives {', '.join(own)} and no token vectors; train it for them")
        width = len(embedder.encode(["a"], outputs=[MULTI_VECTOR]).multi_vector[0][0])
        if colbert_dim not in (None, width):
            raise ValueError(f"colbert_dim {colbert_dim}: token vectors of {model_name_or_path} have {width} numbers")
        return cls(embedder)

    def eval(self) -> "ColBERT":
        """Without effect: the model is never in training mode here."""
        return self

    def to(self, device: "str | torch.device") -> "ColBERT":
        move(self.embedder, device)
        return self

    def compute_score(
        self,
        sentences_pairs: Sequence[Sequence[str]] | Sequence[str],
        batch_size: int = 512,
        query_max_len: int = 128,
        passage_max_len: int = 512,
    ) -> list[float]:
        """MaxSim of [query, document] pairs, in their order: a mean over the query's tokens, or their sum where the
        model is a ColBERT of PyLate or sentence-transformers.

        batch_size: texts of one forward at most. query_max_len, passage_max_len: tokens; what the model cannot take is
        cut to its limit, and a query that is expanded keeps the model's own length.
        """
        settings = self.embedder.settings
        limit = self.embedder.backend.limit or max(query_max_len, passage_max_len)
        query_length = settings.max_lengths["query"] if settings.query_expansion else min(query_max_len, limit)
        lengths = {"query_max_length": query_length, "max_length": min(passage_max_len, limit)}
        scores = self.embedder.compute_score(sentences_pairs, outputs=[MULTI_VECTOR], batch_size=batch_size, **lengths)
        return scores.multi_vector.tolist()


def move(embedder: Embedder, device: "str | torch.device") -> None:
    from rag_retrieval.models.devices import choose_device

    embedder.model.to(choose_device(device))
