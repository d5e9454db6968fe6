import copy
import time

import numpy as np
import pytest
import serve_samples

from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.models.calibration import Calibration
from rag_retrieval.models.options import LONG_DOCUMENT
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.endpoints import PIECE_CHARACTERS
from rag_retrieval.serve.http import RequestError
from rag_retrieval.serve.reranking import (
    EncodedTask,
    RerankModel,
    warm_up_reranker,
)
from rag_retrieval.serve.schemas import RerankTask
from rag_retrieval.serve.warm_up import LEAST_TOKENS, MOST_TOKENS

QUERY = "capital of France"


def documents() -> list[str]:
    """Some fit beside the query into 64 tokens, some do not, some are empty, some are equal."""
    generator = np.random.default_rng(1)
    return ["", *serve_samples.random_documents(generator, 8, longest=120), " \n", "Paris", "Paris"]


def encoded_by(model: RerankModel, task: RerankTask) -> EncodedTask:
    encoded = EncodedTask()
    for piece in model.pieces(task):
        model.encode(task, piece, encoded)
    return encoded


def logits_of(scored):
    return np.array([document.score for document in scored], np.float32)


@pytest.mark.parametrize("name", ["backend", "token_vector_backend"])
def test_scores_are_those_of_the_reranker(name, request):
    backend, task = request.getfixturevalue(name), RerankTask(QUERY, documents())
    for long_document in LONG_DOCUMENT:
        model = RerankModel("tiny", backend, long_document)
        encoded = encoded_by(model, task)
        logits = logits_of(model.scored(task, encoded, list(model.score(encoded.pairs))))
        for normalize in (False, True):
            shown, score_type = model.shown(logits, raw=not normalize)
            results = Reranker.from_backend(backend).rerank(
                QUERY, documents(), normalize=normalize, long_document=long_document
            )
            expected = {result.document_index: result.score for result in results}
            assert shown.tolist() == pytest.approx([expected[place] for place in range(len(shown))], abs=1e-5)
            assert score_type == results.score_type
        truncated = {result.text for result in results if result.truncated}
        assert encoded.truncated == truncated
        assert bool(truncated) == (long_document in ("truncate", "first_slice"))


def test_probabilities_are_calibrated_where_the_folder_has_a_calibration(backend):
    calibrated = copy.copy(backend)
    calibrated.calibration = Calibration(temperature=2.0, bias=0.5, data="dev", pairs=10)
    shown, score_type = RerankModel("tiny", calibrated, "truncate").shown(np.float32([3, -np.inf, -1]), raw=False)
    # 1 / (1 + exp(-2)) and 1 / (1 + exp(0))
    assert shown.tolist() == pytest.approx([0.880797, 0.0, 0.5], abs=1e-6) and score_type == "calibrated"


def test_the_tokens_of_a_document_can_be_limited(backend):
    model = RerankModel("tiny", backend, "truncate")
    text, first = "Paris is the capital of France", "Paris is the"
    tokens = len(backend.pair_encoder.text_ids([first], "document")[0])
    encoded = encoded_by(model, RerankTask(QUERY, [text, first], max_document_tokens=tokens))
    assert list(encoded.pairs[0].ids) == list(encoded.pairs[1].ids)
    assert encoded.truncated == {text}


def test_a_client_that_forbids_to_cut_gets_the_position_of_the_first_text_that_is_too_long(backend):
    model = RerankModel("tiny", backend, "truncate")
    long_text = "Paris " * 100
    task = RerankTask(QUERY, ["a", "", long_text, long_text], as_texts=True, truncate=False)
    with pytest.raises(RequestError, match=r"texts\[2\]: .* 64 tokens") as caught:
        encoded_by(model, task)
    assert caught.value.status == 422
    assert not encoded_by(model, RerankTask(QUERY, ["a", ""], truncate=False)).truncated


def test_pieces_hold_each_distinct_text_once_and_are_bounded(backend):
    texts = ["", "a" * 30_000, "b" * 30_000, "a" * 30_000, "c" * 120_000, "d", " ", "e"]
    pieces = list(RerankModel("tiny", backend, "truncate").pieces(RerankTask(QUERY, texts)))
    assert [[text[0] for text in piece] for piece in pieces] == [["a"], ["b"], ["c"], ["d", "e"]]
    assert all(len(piece) == 1 or sum(map(len, piece)) <= PIECE_CHARACTERS for piece in pieces)


def test_a_query_is_tokenized_once_for_all_pieces(backend, monkeypatch):
    model = RerankModel("tiny", copy.copy(backend), "truncate")
    asked = []
    kind = type(backend.pair_encoder)
    text_ids = kind.text_ids
    monkeypatch.setattr(kind, "text_ids", lambda self, *asks: asked.append(asks) or text_ids(self, *asks))
    encoded_by(model, RerankTask(QUERY, [letter * 40_000 for letter in "abc"]))
    assert [texts for texts, kind in asked if kind == "query" and texts] == [[QUERY]]


def test_scores_that_are_no_numbers_are_an_error(backend):
    model, task = RerankModel("tiny", backend, "truncate"), RerankTask("q", ["a"])
    with pytest.raises(ValueError, match="the score nan"):
        model.scored(task, encoded_by(model, task), [np.float32("nan")])


def test_a_request_without_text_has_no_pairs(backend):
    model = RerankModel("tiny", backend, "max_slice")
    for texts in ([], ["", " "]):
        task = RerankTask(QUERY, texts)
        encoded = encoded_by(model, task)
        assert encoded.pairs == []
        logits = logits_of(model.scored(task, encoded, []))
        assert model.shown(logits, raw=True)[0].tolist() == [-10_000.0] * len(texts)
        assert model.shown(logits, raw=False)[0].tolist() == [0.0] * len(texts)


# ---- before the server listens --------------------------------------------------------------------------


def warmed_up(backend, batch_tokens: int | None = None, long_document: str = "truncate") -> int:
    model = RerankModel("tiny", backend, long_document)
    with Batcher(model.score, MOST_TOKENS, lambda *counts: None) as batcher:
        warm_up_reranker(model, batcher, batch_tokens)
        return batcher.batch_tokens


def test_a_batch_is_what_the_model_scores_in_a_fifth_of_a_second_within_bounds(backend, monkeypatch):
    """A clock that the model alone moves forward; the first call takes ten times as long."""
    for tokens_per_second, batch_tokens, expected in (
        (5000, None, 1000),
        (1000, None, LEAST_TOKENS),
        (1e12, None, MOST_TOKENS),
        (1e12, 77, 77),
    ):
        clock = [0.0]

        def slow(pairs, batch_size, speed=tokens_per_second, clock=clock):
            clock[0] += sum(map(len, pairs)) / speed * (1 if clock[0] else 10)
            return np.zeros(len(pairs), np.float32)

        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: clock[0])
        timed = copy.copy(backend)
        timed.score = slow
        assert warmed_up(timed, batch_tokens) == expected


def test_the_warm_up_holds_short_pairs_and_one_of_the_model_s_length(backend):
    for long_document in ("truncate", "max_slice"):
        lengths = []
        watched = copy.copy(backend)
        watched.score = lambda pairs, size, seen=lengths: seen.extend(map(len, pairs)) or backend.score(pairs, size)
        warmed_up(watched, 100, long_document)
        assert min(lengths) < 16 and max(lengths) == 64 and len(lengths) > 4


def test_token_vectors_warm_up_too(token_vector_backend):
    for long_document in ("truncate", "max_slice"):
        assert warmed_up(token_vector_backend, 100, long_document) == 100


def test_a_tokenizer_with_more_tokens_than_the_model_is_found_before_the_server_listens(backend):
    rows = len(backend.pair_encoder.fast_tokenizer.get_vocab())

    def embedded(pairs, batch_size):
        if any(token >= rows - 1 for pair in pairs for token in pair.ids):
            raise IndexError("index out of range in self")
        return np.zeros(len(pairs), np.float32)

    small = copy.copy(backend)
    small.score = embedded
    with pytest.raises(ValueError, match=f"tiny: the last token of its tokenizer.*{rows - 1}"):
        warmed_up(small, 100)
