"""Models of torch on one device or on several, for any number of threads: backends of Reranker and Embedder."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from threading import Lock
from typing import Generic

import numpy as np
import torch

from rag_retrieval.core.log import Progress
from rag_retrieval.infer.encoded_texts import by_text
from rag_retrieval.models.devices import check_devices, choose_precision
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.loading import position_limit
from rag_retrieval.models.open import open_embedder, open_scorer
from rag_retrieval.models.options import EmbedderOptions, ModelOptions, OpeningOptions
from rag_retrieval.models.outputs import Output
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.prompts import Prompt
from rag_retrieval.models.representations import DENSE, Lexical, TokenVectors
from rag_retrieval.models.scoring import Model, Precision, check_precision, replicas, run_encoded
from rag_retrieval.models.token_batch import TokenBatch


class SharedModel(Generic[Model]):
    """A model that threads share, or its copies on several devices.

    One call computes at a time, whatever the number of threads: families keep things on their modules while they
    compute, and a device gains nothing from two forwards at once.
    """

    def __init__(self, model: Model, precision: Precision | None, devices: list[torch.device] | None):
        """model: is in eval mode from now on. devices: None computes on the model's own, else a copy on each does.
        Raises ValueError for a precision that one of them has not."""
        self.model = model.eval()
        self.models = [self.model] if devices is None else replicas(self.model, devices)
        self.precision, self.name = precision, model.model.name_or_path
        for each in self.models:
            check_precision(precision, each.device)
        self.lock = Lock()

    def run(
        self,
        encoded: Sequence[EncodedPair],
        batch_size: int,
        progress: Progress | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Output:
        """What the model gives for the texts, in their order, on the CPU. batch_size, outputs: as of `run_encoded`."""
        with self.lock:
            self.check_is_open()
            return run_encoded(self.models, encoded, batch_size, self.precision, progress, outputs)

    def each(self, change: Callable[[Model], Model]) -> "SharedModel[Model]":
        """The same of `change(model)` for every copy, under the same lock: they share their layers."""
        other = copy.copy(self)
        other.lock, other.model, other.models = self.lock, change(self.model), [change(one) for one in self.models]
        return other

    def close(self) -> None:
        """Let the model go, so that its memory is free once nothing else holds it."""
        with self.lock:
            self.model, self.models = None, []

    def check_is_open(self) -> None:
        if not self.models:
            raise ValueError(f"{self.name} is closed; open it again")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"lock": None}  # which cannot be copied or pickled

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"lock": Lock()})


class TorchEmbedder(SharedModel[EmbeddingModel]):
    """See `rag_retrieval.infer.backend.EmbedderBackend`."""

    def __init__(
        self, model: EmbeddingModel, precision: Precision | None = None, devices: list[torch.device] | None = None
    ):
        super().__init__(model, precision, devices)
        self.settings, self.text_encoder, self.dim = model.settings, model.text_encoder, model.dim
        self.devices, self.device = len(self.models), str(self.models[0].device)
        self.limit = position_limit(model.model)

    def encode(
        self,
        texts: Sequence[EncodedPair],
        batch_size: int,
        outputs: Sequence[str] = (DENSE,),
        progress: Progress | None = None,
    ) -> dict[str, Sequence]:
        found = self.run(texts, batch_size, progress, outputs)
        return {name: as_numpy(getattr(found, name)) for name in outputs}

    def kept_tokens(self, batch: TokenBatch) -> np.ndarray:
        self.check_is_open()
        return self.model.kept_tokens(batch)

    def check_max_length(self, max_length: int) -> None:
        self.check_is_open()
        self.model.check_max_length(max_length)

    def describe(self) -> str:
        return "packed" if self.model.packs else f"padded: {self.model.packing_problem}"

    def fingerprint(self) -> str:
        encoder, kind = self.text_encoder, self.model.device.type  # whose digits differ
        about = [asdict(self.settings), asdict(encoder.template), self.precision, kind]
        return digest_of_model(self.model, [*about, encoder.tokenizer.backend_tokenizer.to_str()])


class TorchBackend:
    """See `rag_retrieval.infer.backend.Backend`. scorer, precision, devices: as of `SharedModel`."""

    def __init__(
        self, scorer: PairScorer, precision: Precision | None = None, devices: list[torch.device] | None = None
    ):
        self.scorer = scorer
        self._shared = SharedModel(scorer, precision, devices)
        self.name = scorer.model.name_or_path
        self.model_type = scorer.model_type
        self.pair_encoder = scorer.pair_encoder
        self.calibration = scorer.calibration
        self._at_layer: dict[int, TorchBackend] = {}

    @property
    def device(self) -> str:
        return str(self._shared.models[0].device)

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        return self._shared.run(pairs, batch_size).numpy()

    def at_layer(self, layer: int) -> "TorchBackend":
        with self._shared.lock:
            self._shared.check_is_open()
            if layer not in self._at_layer:
                if not isinstance(self.scorer, LLMDecoder):
                    raise ValueError(f"cutoff_layers: {self.name} is an encoder, which has one head; leave it out")
                cut = copy.copy(self)
                cut._shared = self._shared.each(lambda scorer: scorer.at_layer(layer))
                cut.scorer, cut.calibration = cut._shared.model, None
                self._at_layer[layer] = cut
            return self._at_layer[layer]

    def describe(self) -> str:
        layout = "packed" if self.scorer.packs else f"padded: {self.scorer.packing_problem}"
        question = ", asked yes or no" if self.scorer.settings.head else ""
        return f"{type(self.scorer).__name__}{question}, {self.pair_encoder.max_length} tokens, {layout}"

    def fingerprint(self) -> str:
        kind = torch.device(self.device).type  # whose digits differ
        encoder = self.pair_encoder
        templates = [asdict(self.scorer.settings), asdict(encoder.template)]
        about = [*templates, encoder.max_length, self._shared.precision, kind, encoder.split_special_tokens]
        return digest_of_model(self.scorer.model, [*about, encoder.fast_tokenizer.to_str()])

    def close(self) -> None:
        self._shared.close()
        self.scorer, self._at_layer = None, {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_at_layer": {}}


def as_numpy(output: torch.Tensor | Lexical | TokenVectors) -> Sequence:
    """A representation of texts: the rows of dense vectors, else one entry for each text."""
    if isinstance(output, torch.Tensor):
        return output.numpy()
    *values, counts = (tensor.numpy() for tensor in output)
    return by_text(values, counts)


def digest_of_model(model: torch.nn.Module, about: list) -> str:
    """Of the weights and of what else decides on scores, as JSON values."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_torch_backend(
    model_name_or_path: str | os.PathLike, options: ModelOptions, question: Prompt | None = None
) -> TorchBackend:
    """Raises ValueError as `open_scorer`, and for devices and a precision that are not there."""
    devices = devices_of(options)
    scorer = open_scorer(model_name_or_path, options, question)
    return TorchBackend(scorer, choose_precision(options.precision), devices)


def open_torch_embedder(model_name_or_path: str | os.PathLike, options: EmbedderOptions) -> TorchEmbedder:
    """Raises ValueError as `open_embedder`, and for devices and a precision that are not there."""
    devices = devices_of(options)
    return TorchEmbedder(open_embedder(model_name_or_path, options), choose_precision(options.precision), devices)


def devices_of(options: OpeningOptions) -> list[torch.device] | None:
    return None if options.devices is None else check_devices(options.devices)
