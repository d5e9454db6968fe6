"""The backend of torch: a CrossEncoder or an LLMDecoder, on one device or on several.

One call computes at a time, whatever the number of threads: families keep things on their modules while they compute,
and a device gains nothing from two forwards at once.
"""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from threading import Lock

import numpy as np
import torch

from rag_retrieval.models.devices import check_devices, choose_precision
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.open import open_scorer
from rag_retrieval.models.options import ModelOptions
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.prompts import Prompt
from rag_retrieval.models.scoring import Precision, check_precision, replicas, run_encoded


class TorchBackend:
    """See `rag_retrieval.infer.backend.Backend`.

    scorer: is in eval mode from now on. devices: None scores on the scorer's own, else a copy on each does.
    """

    def __init__(
        self, scorer: PairScorer, precision: Precision | None = None, devices: list[torch.device] | None = None
    ):
        self.scorer = scorer.eval()
        self.name = scorer.model.name_or_path
        self.precision = precision
        self.scorers = [self.scorer] if devices is None else replicas(self.scorer, devices)
        self.model_type = scorer.model_type
        self.pair_encoder = scorer.pair_encoder
        self.calibration = scorer.calibration
        self._lock = Lock()
        self._at_layer: dict[int, TorchBackend] = {}

    @property
    def device(self) -> str:
        return str(self.scorers[0].device)

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        if not pairs:
            return np.empty(0, np.float32)
        with self._lock:
            return run_encoded(self.scorers, pairs, batch_size, self.precision).numpy()

    def at_layer(self, layer: int) -> "TorchBackend":
        with self._lock:
            if layer not in self._at_layer:
                if not isinstance(self.scorer, LLMDecoder):
                    raise ValueError(f"cutoff_layers: {self.name} is an encoder, which has one head; leave it out")
                cut = copy.copy(self)
                cut._lock = self._lock  # they share their layers
                cut.scorer, cut.scorers = self.scorer.at_layer(layer), [one.at_layer(layer) for one in self.scorers]
                cut.calibration = None
                self._at_layer[layer] = cut
            return self._at_layer[layer]

    def describe(self) -> str:
        layout = "packed" if self.scorer.packs else f"padded: {self.scorer.packing_problem}"
        question = ", asked yes or no" if self.scorer.settings.head else ""
        return f"{type(self.scorer).__name__}{question}, {self.pair_encoder.max_length} tokens, {layout}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        kind = torch.device(self.device).type  # whose digits differ
        encoder = self.pair_encoder
        about = [asdict(self.scorer.settings), asdict(encoder.template), encoder.max_length, self.precision, kind]
        digest.update(json.dumps([*about, encoder.split_special_tokens]).encode())
        digest.update(encoder.fast_tokenizer.to_str().encode())
        for name, values in sorted(self.scorer.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is held outside this process."""

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_lock": None, "_at_layer": {}}  # a lock cannot be copied or pickled

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"_lock": Lock()})


def open_torch_backend(
    model_name_or_path: str | os.PathLike, options: ModelOptions, question: Prompt | None = None
) -> TorchBackend:
    """Raises ValueError as `open_scorer`, and for devices and a precision that are not there."""
    devices = None if options.devices is None else check_devices(options.devices)
    precision = choose_precision(options.precision)
    scorer = open_scorer(model_name_or_path, options, question)
    for device in devices or [scorer.device]:
        check_precision(precision, device)
    return TorchBackend(scorer, precision, devices)
