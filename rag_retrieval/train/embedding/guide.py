"""Vectors of a guide model for every text of the training data, by which false negatives are found (GISTEmbed,
https://arxiv.org/abs/2402.16829). They are computed once and kept in the cache, so that a step only looks them up.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from rag_retrieval.core.files import content_digest
from rag_retrieval.data.step_records import QUERY_MARK, first_of_each
from rag_retrieval.data.store import RecordStore, cache_folder
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.representations import DENSE
from rag_retrieval.models.scoring import run_encoded
from rag_retrieval.models.settings import model_content

logger = logging.getLogger(__name__)

VERSION = 1  # raise it whenever the same model and data would give other files
CHUNK, FORWARD = 4096, 256  # texts encoded at once, and at most in one forward


class GuideVectors:
    """By the ids of the texts, as `StepRecords` has them."""

    def __init__(self, folder: Path):
        self.ids = np.load(folder / "ids.npy")  # ascending
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")

    def of(self, ids: np.ndarray) -> torch.Tensor:
        """float32 [ids, width]. ids: uint64, of texts of the training data."""
        places = np.searchsorted(self.ids, ids)
        assert (self.ids[places] == ids).all(), "a text that is not in the training data"
        return torch.from_numpy(self.vectors[places])


def open_guide(
    model: str, stores: Sequence[RecordStore], wait_minutes: float, trust_remote_code: bool = False
) -> GuideVectors:
    """The vectors of `model` for all texts of the stores, computed unless the cache has them; one process of a machine
    does it, and the others wait for `wait_minutes` at most. Raises ValueError for a model that is no embedder or gives
    a vector that is not finite, and where the wait was too short."""
    identity = [VERSION, model_content(model), [content_digest(store.files) for store in stores]]
    folder = cache_folder() / f"guide-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"
    lock = FileLock(f"{folder}.lock", timeout=60 * wait_minutes)
    try:
        with lock:
            if not folder.is_dir():
                build_vectors(folder, model, stores, trust_remote_code)
    except Timeout:
        raise ValueError(
            f"guide_model {model}: another process has held {lock.lock_file} for {wait_minutes:g} minutes "
            "(wait_minutes), while it computes the vectors; start again when it is done, or raise wait_minutes"
        ) from None
    return GuideVectors(folder)


def build_vectors(folder: Path, model: str, stores: Sequence[RecordStore], trust_remote_code: bool) -> None:
    temporary = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        write_vectors(temporary, model, stores, trust_remote_code)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_vectors(folder: Path, name: str, stores: Sequence[RecordStore], trust_remote_code: bool) -> None:
    model = open_embedder(name, EmbedderOptions(trust_remote_code=trust_remote_code))
    queries, documents = (distinct_texts(stores, kind) for kind in ("query", "document"))
    ids = np.concatenate([queries[0], documents[0]])
    rows = np.empty(len(ids), np.int64)
    rows[np.argsort(ids)] = np.arange(len(ids))
    np.save(folder / "ids.npy", np.sort(ids))
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (len(ids), model.dim))
    logger.info("guide_model %s: computing the vectors of %s texts", name, f"{len(ids):,}")
    done = 0
    for kind, (_, places) in (("query", queries), ("document", documents)):
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK]
            texts = [stores[s].query(p) if kind == "query" else stores[s].pair(p).document for s, p in chunk.tolist()]
            encoded = model.text_encoder.encode(texts, kind)
            found = run_encoded([model], encoded, FORWARD, outputs=(DENSE,)).dense.numpy()
            if not np.isfinite(found).all():
                raise ValueError(f"guide_model {name}: it gave a vector that is not finite; take another model")
            vectors[rows[done : done + len(chunk)]] = found
            done += len(chunk)
    vectors.flush()


def distinct_texts(stores: Sequence[RecordStore], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, uint64 [texts]; for each the first place that has it, as (store, group or pair): int64 [texts, 2])."""
    of_stores = [store.query_ids ^ QUERY_MARK if kind == "query" else store.document_ids for store in stores]
    ids = np.concatenate(of_stores)
    places = np.concatenate([
        np.stack([np.full(len(own), number), np.arange(len(own))], axis=1) for number, own in enumerate(of_stores)
    ])  # fmt: skip
    first, _ = first_of_each(ids)
    return ids[first], places[first]
