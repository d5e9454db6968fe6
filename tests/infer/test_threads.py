"""One Reranker, several threads; one event loop that is not blocked; no torch where none is needed."""

import asyncio
import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from tiny_models import CHINESE, ENGLISH

from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.infer.torch_backend import TorchBackend

THREADS = 8


def requests() -> list[tuple[str, list[str]]]:
    """Short and long documents in both languages, so that threads differ in length, slices and tokens."""
    texts = [*ENGLISH, *CHINESE, " ".join(ENGLISH) * 3, "".join(CHINESE) * 20]
    return [(texts[place % 16], texts[place % 5 :: 2]) for place in range(12)]


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_eight_threads_get_the_scores_of_one(family, load_tiny):
    reranker = Reranker.from_backend(TorchBackend(load_tiny(family, max_length=64)))
    alone = [reranker.rerank(*request) for request in requests()]
    with ThreadPoolExecutor(THREADS) as threads:
        together = list(threads.map(lambda request: reranker.rerank(*request), requests()))
    for expected, found in zip(alone, together, strict=True):
        assert found == expected


def test_threads_that_tokenize_and_pad_with_the_same_tokenizer_disturb_nothing(load_tiny):
    """transformers sets truncation on the tokenizer itself; ours works on a copy."""
    scorer = load_tiny("bert")
    reranker = Reranker.from_backend(TorchBackend(scorer))
    expected = [reranker.rerank(*request) for request in requests()]

    def disturb(place: int):
        for length in range(200):
            try:
                scorer.tokenizer(list(ENGLISH), truncation=True, padding=True, max_length=3 + (length + place) % 9)
            except RuntimeError:  # "Already borrowed": the disturbers' own, between themselves
                continue

    with ThreadPoolExecutor(THREADS) as threads:
        disturbing = [threads.submit(disturb, place) for place in range(3)]
        found = list(threads.map(lambda request: reranker.rerank(*request), requests()))
        for work in disturbing:
            work.result()
    assert found == expected


def test_the_event_loop_runs_while_documents_are_scored(load_tiny):
    reranker = Reranker.from_backend(TorchBackend(load_tiny("bert")))
    score, entered, may_score = reranker.backend.score, threading.Barrier(3), threading.Event()

    def waiting_score(pairs, batch_size):
        entered.wait(60)
        assert may_score.wait(60), "the event loop did not run"
        return score(pairs, batch_size)

    reranker.backend.score = waiting_score

    async def rerank() -> list:
        work = asyncio.gather(
            reranker.arerank("where is Paris?", list(ENGLISH), top_k=3),
            reranker.arerank_many(["where is Paris?"], [list(ENGLISH)], top_k=3),
        )
        await asyncio.to_thread(entered.wait, 60)
        may_score.set()
        return await work

    one, many = asyncio.run(rerank())
    reranker.backend.score = score
    assert one == many[0] == reranker.rerank("where is Paris?", list(ENGLISH), top_k=3)


@pytest.mark.slow
def test_a_reranker_can_be_copied_pickled_and_sent_to_another_process(load_tiny):
    reranker = Reranker.from_backend(TorchBackend(load_tiny("bert", max_length=64)))
    expected = reranker.rerank(*requests()[0])  # also after its first use
    for other in (copy.copy(reranker), copy.deepcopy(reranker), pickle.loads(pickle.dumps(reranker))):
        assert other.rerank(*requests()[0]) == expected
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        there = processes.submit(reranker.rerank, *requests()[0]).result(600)
    # as many threads as cores compute there, one here, so the last digits may differ
    assert [result.doc_id for result in there] == [result.doc_id for result in expected]
    assert [result.score for result in there] == pytest.approx([result.score for result in expected], abs=1e-5)


MODULES = ["infer.reranker", "infer.backend", "infer.long_documents", "infer.results", "models.pair_encoding",
           "models.token_batch", "models.calibration", "models.settings", "models.text_scoring", "models.inputs",
           "models.vectors", "infer.onnx_backend"]  # fmt: skip


def test_what_other_backends_need_imports_neither_torch_nor_transformers():
    imports = "; ".join(f"import rag_retrieval.{module}" for module in MODULES)
    found = "sorted({'torch', 'transformers'} & set(sys.modules))"
    code = f"import sys; {imports}; from rag_retrieval import Reranker; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_array_and_a_tensor_get_the_same_probabilities():
    import torch

    from rag_retrieval.models.calibration import Calibration, probabilities_of

    scores = np.array([-200, -20, -1, 0, 1, 20, 200], np.float32)
    for calibration in (None, Calibration(1.5, 0.25, "dev", 10)):
        found = probabilities_of(scores, calibration).values
        expected = probabilities_of(torch.from_numpy(scores), calibration).values.numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
