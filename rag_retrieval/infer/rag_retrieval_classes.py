"""RAG-Retrieval's classes for embedding models, with the methods that they have there."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag_retrieval.infer.embedder import Embedder

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
        from rag_retrieval.models.devices import choose_device

        self.embedder.model.to(choose_device(device))
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

        from rag_retrieval.models.loading import DEFAULT_MAX_LENGTH, position_limit

        if device is not None:
            self.to(device)
        if max_len is None:
            max_len = min(DEFAULT_MAX_LENGTH, position_limit(self.embedder.model.model) or DEFAULT_MAX_LENGTH)
        return torch.from_numpy(self.embedder.encode(sentences, prompt, max_length=max_len, batch_size=batch_size))
