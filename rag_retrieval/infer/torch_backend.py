"""The backend of torch: a CrossEncoder or an LLMDecoder, on one device or on several.

What a reader would get wrong: one call computes at a time, whatever the number of threads. Families keep things on
their modules while they compute, and a device gains nothing from two forwards at once.
"""

from collections.abc import Sequence
from threading import Lock

import numpy as np
from tqdm.auto import tqdm

from rag_retrieval.infer.backend import BackendOptions
from rag_retrieval.models.load_reranker import CLASSES, model_type_of
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.scoring import mode_of, score_chunk
from rag_retrieval.models.scoring_mode import Precision


class TorchBackend:
    """See `rag_retrieval.infer.backend.Backend`. scorer: in eval mode from now on."""

    def __init__(self, scorer: PairScorer, precision: Precision | None = None):
        self.scorer = scorer.eval()
        self.precision = precision
        self.model_type = scorer.model_type
        self.pair_encoder = scorer.pair_encoder
        self.calibration = scorer.calibration
        self._lock = Lock()

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        if not pairs:
            return np.empty(0, np.float32)
        with self._lock, mode_of(self.scorer, self.precision):
            return score_chunk(self.scorer, pairs, batch_size, tqdm(disable=True)).numpy()

    def close(self) -> None:
        self.scorer.close()


def open_torch_backend(path: str, options: BackendOptions) -> TorchBackend:
    kind = CLASSES[options.model_type or model_type_of(path)]
    scorer = kind.from_pretrained(path, max_length=options.max_length)
    return TorchBackend(scorer.to(options.device or "cpu"), options.precision)
