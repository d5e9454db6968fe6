"""The backend of torch: a CrossEncoder or an LLMDecoder, on one device or on several.

What a reader would get wrong: one call computes at a time, whatever the number of threads. Families keep things on
their modules while they compute, and a device gains nothing from two forwards at once.
"""

import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from tqdm.auto import tqdm

from rag_retrieval.infer.backend import BackendOptions
from rag_retrieval.infer.devices import choose_device, choose_dtype, choose_precision
from rag_retrieval.infer.model_kind import check_head_is_trained, check_is_reranker, read_model_files
from rag_retrieval.infer.prompts import with_prompt
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.decoder_template import INSTRUCTION
from rag_retrieval.models.device_pool import DevicePool, check_devices, weights_of
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.load_reranker import model_type_of
from rag_retrieval.models.model_files import FORMAT_NAMES, MODEL_TYPES, YES_NO_NAMES, read_settings
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.scoring import ScoringOptions, mode_of, score_chunk
from rag_retrieval.models.scoring_mode import Precision, check_precision

DECODER_NAMES = (*FORMAT_NAMES, "head", *YES_NO_NAMES)


class TorchBackend:
    """See `rag_retrieval.infer.backend.Backend`.

    scorer: is in eval mode from now on. devices: None scores on the scorer's own, else a process on each does.
    """

    def __init__(
        self, scorer: PairScorer, precision: Precision | None = None, devices: list[torch.device] | None = None
    ):
        self.scorer = scorer.eval()
        self.precision = precision
        self.devices = devices
        self.model_type = scorer.model_type
        self.pair_encoder = scorer.pair_encoder
        self.calibration = scorer.calibration
        self._pool: DevicePool | None = None
        self._lock = Lock()

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        if not pairs:
            return np.empty(0, np.float32)
        with self._lock:
            scores = self._on_one(pairs, batch_size) if self.devices is None else self._on_several(pairs, batch_size)
        return scores.numpy()

    def _on_one(self, pairs: Sequence[EncodedPair], batch_size: int) -> torch.Tensor:
        with mode_of(self.scorer, self.precision):
            return score_chunk(self.scorer, pairs, batch_size, tqdm(disable=True))

    def _on_several(self, pairs: Sequence[EncodedPair], batch_size: int) -> torch.Tensor:
        if self._pool is None or not self._pool.close.alive:  # it closes when a process of it fails
            self._pool = DevicePool(self.scorer, self.devices, weights_of(self.scorer))
        return self._pool.score(pairs, ScoringOptions(batch_size, None, self.precision), tqdm(disable=True))

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.close()

    def __getstate__(self) -> dict:
        """For copies and pickles: the lock and the processes of `devices` stay with the original."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_pool")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=Lock(), _pool=None)


def open_torch_backend(path: str, options: BackendOptions) -> TorchBackend:
    """path: a folder or a hub name. Raises ValueError as `Reranker` says."""
    precision, dtype = choose_precision(options.precision), choose_dtype(options.dtype)
    devices = None if options.devices is None else check_devices(options.devices)
    if devices is not None and options.device is not None:
        raise ValueError("device and devices are both given; give one of them")
    device = torch.device("cpu") if devices else choose_device(options.device)
    for used in devices or [device]:
        check_precision(precision, used)
    with telling_what_is_missing(path):
        scorer = load(path, options, dtype)
    check_head_is_trained(path, scorer.new_parameters)
    check_numbers(path, scorer)
    return TorchBackend(scorer.to(device), precision, devices)


@contextmanager
def telling_what_is_missing(path: str):
    """ValueError for the OSError of other libraries over a name that is neither a folder nor known to the hub, also
    where `reading` has made it one that says nothing of folders."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        where = "" if Path(path).is_dir() else f"no such folder (looked from {Path.cwd()}), and as a name on the hub: "
        raise ValueError(f"{path}: {where}{reason:.300}") from error


def load(path: str, options: BackendOptions, dtype: torch.dtype | None) -> PairScorer:
    check_texts(options)
    files = read_model_files(path)
    saved = read_settings(path)
    check_is_reranker(files)
    if options.model_type not in (None, *MODEL_TYPES):
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, found {options.model_type!r}")
    model_type = options.model_type or (saved and saved.model_type)
    if model_type is None:
        model_type = LLMDecoder.model_type if files.answers else model_type_of(path, options.trust_remote_code)
    common = dict(max_length=options.max_length, dtype=dtype, trust_remote_code=options.trust_remote_code)
    if model_type == CrossEncoder.model_type:
        check_no_prompt(path, options)
        return CrossEncoder.from_pretrained(path, **common)
    chosen = options if saved is not None else with_prompt(files, options)
    check_fields(options, chosen.head or (saved and saved.head))
    return LLMDecoder.from_pretrained(path, **common, **{name: getattr(chosen, name) for name in DECODER_NAMES})


def check_texts(options: BackendOptions) -> None:
    for name in ("model_type", *DECODER_NAMES):
        value = getattr(options, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}: expected a string, found {type(value).__name__}")


def check_fields(options: BackendOptions, head: str | None) -> None:
    """Raises ValueError for a field such as {text} in a format given here: it would be read as words."""
    known = ["{}", INSTRUCTION] if head == "yes_no" else ["{}"]
    for name in FORMAT_NAMES:
        for field in re.findall(r"\{[^\W\d]\w*\}", getattr(options, name) or ""):
            if field not in known:
                raise ValueError(f"{name}: unknown field {field}; known are {' and '.join(known)}")


def check_no_prompt(path: str, options: BackendOptions) -> None:
    for name in DECODER_NAMES:
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is for decoders, and {path} is an encoder, which has no prompt; leave it out")


def check_numbers(path: str, scorer: PairScorer) -> None:
    """Raises ValueError for weights with NaN or infinity: sums in float32, which one of them makes the same."""
    for name, tensor in scorer.model.named_parameters():
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            raise ValueError(
                f"{path}: the weights {name} are not all finite numbers; the training may have failed. Give another "
                "checkpoint"
            )
