"""`Reranker`: documents in the order in which they answer a query, from any folder that holds a reranker.

The documents are ordered by the model's logits, whatever is shown as their score. Nothing here imports torch.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.infer.backend import Backend, open_backend
from rag_retrieval.infer.long_documents import NO_TEXT, PassageEncoder, score_pairs
from rag_retrieval.infer.results import RerankResult, RerankResults, best_first, shown_scores
from rag_retrieval.models.inputs import (
    Document,
    check_documents,
    check_flag,
    check_list,
    check_number,
    check_pairs,
    check_text,
)
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP, options_among

if TYPE_CHECKING:
    import torch

class Reranker:
    """A model that scores how well documents answer a query. Several threads may call one.

    model_name_or_path: a folder that was trained or exported here, a sentence-transformers folder, any other folder of
    a reranker, a hub name, or `package:NAME`. What it holds is read from its files. A model that gives token vectors
    (ColBERT, bge-m3) ranks by MaxSim; its max_length is that of a document, and options from query_format on do not
    apply to it.
    model_type: "bert_encoder" or "llm_decoder", against what the files say; of an exported folder "openvino" takes
    that runtime in place of ONNX Runtime. max_length: tokens per pair; default what
    the folder was saved with, else 512 or the model's limit. dtype: of the weights: "fp32" (the default), "bf16",
    "fp16". precision: of the computation with float32 weights: "fp32", "bf16", "fp16"; default half precision on CUDA
    and float32 elsewhere. device: "cpu", "cuda:0", "mps", "npu:0"; default CUDA where there is one, else the CPU.
    devices: several, such as ["cuda:0", "cuda:1"]: each holds a copy of the model, until `close`.
    attn_implementation: of transformers; default batches without padding. query_format, document_format: text around a
    query and a document. split_special_tokens: of an encoder, as for `CrossEncoder.from_pretrained`. seq and all after
    it: of a decoder, as for `LLMDecoder.from_pretrained`; needed, with the formats, where neither the folder nor the
    list of known prompts has them.

    Raises ValueError for a path that is not there, a folder without weights, weights that are not numbers, a model
    without a trained head (an embedding model), a decoder whose prompt is not known, and options that do not fit.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike,
        *,
        model_type: str | None = None,
        max_length: int | None = None,
        precision: str | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        devices: "Sequence[str | torch.device] | None" = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        query_format: str | None = None,
        document_format: str | None = None,
        split_special_tokens: bool | None = None,
        seq: str | None = None,
        special_token: str | None = None,
        head: str | None = None,
        instruction: str | None = None,
        yes_token: str | None = None,
        no_token: str | None = None,
        cutoff_layer: int | None = None,
    ):
        arguments = locals()
        if not isinstance(model_name_or_path, (str, os.PathLike)):
            kind = type(model_name_or_path).__name__
            raise ValueError(f"model_name_or_path: expected a folder or a name, found {kind}")
        if max_length is not None:
            check_number("max_length", max_length, 1, "tokens")
        self.backend: Backend = open_backend(model_name_or_path, options_among(arguments))

    @classmethod
    def from_backend(cls, backend: Backend) -> "Reranker":
        """A Reranker over a backend that is open already."""
        reranker = cls.__new__(cls)
        reranker.backend = backend
        return reranker

    @property
    def max_length(self) -> int:
        """Tokens per pair at most."""
        return self.backend.pair_encoder.max_length

    def compute_score(
        self,
        pairs: Sequence[Sequence[str]] | Sequence[str],
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        long_document: str = "truncate",
        overlap: int = OVERLAP,
        cutoff_layers: Sequence[int] | int | None = None,
    ) -> np.ndarray:
        """Scores of [query, document] pairs, or of one such pair: [pairs], float32, in the order given.

        Options as for `rerank`, but long pairs are cut unless `long_document` says otherwise. cutoff_layers: of a model
        with heads at several layers, where to stop and read the score; of several layers the scores are
        [layers, pairs]. ValueError naming the position of a bad pair.
        """
        if cutoff_layers is not None:
            options = dict(batch_size=batch_size, max_length=max_length, normalize=normalize)
            options |= dict(long_document=long_document, overlap=overlap)
            layers = [cutoff_layers] if isinstance(cutoff_layers, int) else check_list("cutoff_layers", cutoff_layers)
            if not layers:
                raise ValueError("cutoff_layers: expected at least one layer, found none")
            scores = [self.at_layer(layer).compute_score(pairs, **options) for layer in layers]
            return scores[0] if len(scores) == 1 else np.stack(scores)
        check_number("batch_size", batch_size, 1, "pairs")
        check_flag("normalize", normalize)
        encoder = self.passage_encoder(max_length, long_document, overlap)
        scored = score_pairs(self.backend, encoder, check_pairs(pairs), batch_size)
        logits = np.array([pair.score for pair in scored], np.float32)
        return shown_scores(logits, self.backend.calibration, normalize)[0]

    def rerank(
        self,
        query: str,
        documents: Sequence[str | Mapping | None],
        top_k: int | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        long_document: str = LONG_DOCUMENT_DEFAULT,
        overlap: int = OVERLAP,
    ) -> RerankResults:
        """The documents, best first; those with equal logits in the order given.

        documents: strings, or dicts with "text" and, if wanted, "id" and "metadata"; further keys join the metadata.
        A document without text (None, "", white space) comes last, with EMPTY_SCORE (-10000; 0 with `normalize`).
        top_k: how many come back; all are scored. batch_size: pairs of one forward at most. max_length: tokens per
        pair, at most that of the Reranker.
        normalize: show values in [0, 1] instead of logits: the calibrated probability where the folder has a
        calibration, else the sigmoid; `score_type` of the results says which. The order stays that of the logits.
        long_document: how a document that does not fit beside the query is read. "truncate": its beginning, and a query
        longer than half of the room is cut too; "max_slice": in slices, and the best one's score is the document's;
        "mean_slice": their mean; "first_slice": the first alone. Slices keep the query whole unless it takes more than
        three quarters of the room. overlap: tokens that neighbouring slices share, at most half a slice. On MedQuAD, a
        MiniLM trained at 256 tokens has nDCG@10 .745 truncated and .737 by its best slices, which compute 2.4
        times the tokens (docs/reranker.md has the table and the command).

        Raises ValueError that names the argument and the position, as `documents[3]`.
        """
        checked = [check_documents("documents", documents)]
        encoder = self.passage_encoder(max_length, long_document, overlap)
        return self._rerank([check_text("query", query)], checked, encoder, top_k, batch_size, normalize)[0]

    def rerank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str | Mapping | None]],
        top_k: int | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        long_document: str = LONG_DOCUMENT_DEFAULT,
        overlap: int = OVERLAP,
    ) -> list[RerankResults]:
        """`rerank` for several queries, whose pairs share forwards. documents: a list for each query.

        Raises ValueError that names the position, as `queries[2]` or `documents[2][3]`.
        """
        texts = [check_text(f"queries[{place}]", query) for place, query in enumerate(check_list("queries", queries))]
        lists = check_list("documents", documents)
        if len(lists) != len(texts):
            raise ValueError(f"documents: expected a list for each of the {len(texts)} queries, found {len(lists)}")
        checked = [check_documents(f"documents[{place}]", own) for place, own in enumerate(lists)]
        encoder = self.passage_encoder(max_length, long_document, overlap)
        return self._rerank(texts, checked, encoder, top_k, batch_size, normalize)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str | Mapping | None],
        top_k: int | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        long_document: str = LONG_DOCUMENT_DEFAULT,
        overlap: int = OVERLAP,
    ) -> RerankResults:
        """`rerank` in a thread, so that the event loop is not blocked."""
        arguments = (query, documents, top_k, batch_size, max_length, normalize, long_document, overlap)
        return await asyncio.to_thread(self.rerank, *arguments)

    async def arerank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str | Mapping | None]],
        top_k: int | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        long_document: str = LONG_DOCUMENT_DEFAULT,
        overlap: int = OVERLAP,
    ) -> list[RerankResults]:
        """`rerank_many` in a thread, so that the event loop is not blocked."""
        arguments = (queries, documents, top_k, batch_size, max_length, normalize, long_document, overlap)
        return await asyncio.to_thread(self.rerank_many, *arguments)

    def at_layer(self, layer: int) -> "Reranker":
        """A Reranker that stops at a layer and reads its head, of a model with heads at several layers (layer-wise); it
        shares the weights. Raises ValueError for a layer without a head."""
        check_number("cutoff_layers", layer, 1, "layers")
        return Reranker.from_backend(self.backend.at_layer(layer))

    def close(self) -> None:
        """Let the model go: its memory, on a device too, is free once nothing else holds it. Scoring then raises
        ValueError."""
        self.backend.close()

    def __enter__(self) -> "Reranker":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def passage_encoder(self, max_length: int | None, long_document: str, overlap: int = OVERLAP) -> PassageEncoder:
        """Texts to tokens, with the options of `rerank`, which it refuses with ValueError."""
        encoder = self.backend.pair_encoder
        if max_length is not None:
            check_number("max_length", max_length, 1, "tokens")
            if max_length > encoder.max_length:
                raise ValueError(
                    f"max_length {max_length} is more than the {encoder.max_length} tokens that this Reranker was "
                    f"opened with; open it with max_length={max_length}"
                )
            encoder = encoder.with_max_length(max_length)
        return PassageEncoder(encoder, long_document, overlap)

    def _rerank(
        self,
        queries: list[str],
        lists: list[list[Document]],
        encoder: PassageEncoder,
        top_k: int | None,
        batch_size: int,
        normalize: bool,
    ) -> list[RerankResults]:
        """Scores all pairs with a text in one call and assigns the results in the same order."""
        check_number("batch_size", batch_size, 1, "pairs")
        check_flag("normalize", normalize)
        if top_k is not None:
            check_number("top_k", top_k, 1, "documents")
        pairs = [(query, document.text) for query, documents in zip(queries, lists, strict=True)
                 for document in documents if not document.is_empty]  # fmt: skip
        all_scored = iter(score_pairs(self.backend, encoder, pairs, batch_size))
        ranked = []
        for query, documents in zip(queries, lists, strict=True):
            scored = [NO_TEXT if document.is_empty else next(all_scored) for document in documents]
            logits = np.array([pair.score for pair in scored], np.float32)
            scores, score_type = shown_scores(logits, self.backend.calibration, normalize)
            results = [
                RerankResult(
                    doc_id=documents[place].doc_id,
                    text=documents[place].text,
                    score=float(scores[place]),
                    rank=rank,
                    metadata=documents[place].metadata,
                    document_index=int(place),
                    slice=scored[place].span,
                    truncated=scored[place].truncated,
                )
                for rank, place in enumerate(best_first(logits)[:top_k], start=1)
            ]
            ranked.append(RerankResults(query, results, score_type))
        return ranked


def open_reranker(
    model: Reranker | str | os.PathLike,
    *,
    device: "str | torch.device | None" = None,
    trust_remote_code: bool = False,
) -> Reranker:
    """The Reranker itself, or that of a folder, hub name or `package:NAME`. Raises ValueError as `Reranker`."""
    if isinstance(model, Reranker):
        return model
    if isinstance(model, (str, os.PathLike)):
        return Reranker(model, device=device, trust_remote_code=trust_remote_code)
    raise ValueError(f"reranker: expected a Reranker, or the name or folder of one; found {type(model).__name__}")
