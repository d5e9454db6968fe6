import copy

import numpy as np
import pytest
import serve_samples

from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.models.calibration import Calibration
from rag_retrieval.serve.refusal import Refusal
from rag_retrieval.serve.rerank_request import RerankRequest
from rag_retrieval.serve.served_model import ServedModel

QUERY = "capital of France"


def documents() -> list[str]:
    """Some fit beside the query into 64 tokens, some do not, some are empty."""
    generator = np.random.default_rng(1)
    return ["", *serve_samples.random_documents(generator, 8, longest=120), " \n", "Paris"]


def request(**options) -> RerankRequest:
    return RerankRequest(QUERY, documents(), text_shape=True, **options)


@pytest.mark.parametrize("long_document", ["truncate", "max_slice", "mean_slice", "first_slice"])
@pytest.mark.parametrize("normalized", [False, True])
def test_scores_are_those_of_the_reranker(backend, long_document, normalized):
    model = ServedModel("tiny", backend, long_document)
    encoded = model.encode(request())
    scores = model.document_scores(encoded, model.score(encoded.pairs))
    shown = model.shown(scores, raw=not normalized)
    results = Reranker.from_backend(backend).rerank(
        QUERY, documents(), normalize=normalized, long_document=long_document
    )
    expected = {result.document_index: result.score for result in results}
    assert shown.tolist() == pytest.approx([expected[place] for place in range(len(shown))], abs=1e-5)
    truncated = {result.document_index for result in results if result.truncated}
    assert set(encoded.truncated) == truncated
    assert bool(truncated) == (long_document in ("truncate", "first_slice"))


def test_probabilities_are_calibrated_where_the_folder_has_a_calibration(backend):
    calibrated = copy.copy(backend)
    calibrated.calibration = Calibration(temperature=2.0, bias=0.5, data="dev", pairs=10)
    model = ServedModel("tiny", calibrated, "truncate")
    shown = model.shown(np.array([3.0, -np.inf, -1.0], np.float32), raw=False)
    # 1 / (1 + exp(-2)) and 1 / (1 + exp(0))
    assert shown.tolist() == pytest.approx([0.880797, 0.0, 0.5], abs=1e-6)


def test_the_tokens_of_a_document_can_be_limited(backend):
    model = ServedModel("tiny", backend, "truncate")
    text = "Paris is the capital of France"
    first = "Paris is the"
    tokens = len(backend.pair_encoder.document_ids([first])[0])
    asked = RerankRequest(QUERY, [text, first], text_shape=False, max_document_tokens=tokens)
    encoded = model.encode(asked)
    assert encoded.pairs[0].ids.tolist() == encoded.pairs[1].ids.tolist()
    assert encoded.truncated == [0]


def test_a_client_that_forbids_to_cut_is_told_the_first_text_that_is_too_long(backend):
    model = ServedModel("tiny", backend, "truncate")
    long_text = "Paris " * 100
    with pytest.raises(Refusal, match=r"texts\[2\]: longer, with its query, than the 64 tokens of this") as caught:
        model.encode(RerankRequest(QUERY, ["a", "", long_text, long_text], text_shape=True, truncate=False))
    assert caught.value.status == 422
    assert not model.encode(RerankRequest(QUERY, ["a", ""], text_shape=True, truncate=False)).truncated


def test_scores_that_are_no_numbers_are_an_error(backend):
    broken = copy.copy(backend)
    broken.score = lambda pairs, batch_size: np.full(len(pairs), np.nan, np.float32)
    with pytest.raises(ValueError, match="tiny: 1 of 1 scores are no numbers"):
        ServedModel("tiny", broken, "truncate").score(serve_samples.numbered_pairs(5, 1))


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_a_request_without_text_has_no_pairs(backend, texts):
    model = ServedModel("tiny", backend, "max_slice")
    encoded = model.encode(RerankRequest(QUERY, texts, text_shape=True))
    assert encoded.pairs == []
    scores = model.document_scores(encoded, np.empty(0, np.float32))
    assert model.shown(scores, raw=True).tolist() == [-10_000.0] * len(texts)
    assert model.shown(scores, raw=False).tolist() == [0.0] * len(texts)
