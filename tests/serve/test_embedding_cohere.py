"""`/v2/embed` and `/v1/embed`: the types by hand, and Cohere's own clients on a running server."""

import asyncio
import struct
from base64 import b64decode

import cohere
import numpy as np
import pytest
from serve_embedding_samples import MIXED, ask, running_embedder
from serve_samples import listening

TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]


@pytest.fixture(scope="module")
def service(embedders):
    with running_embedder(embedders["calibrated"], max_documents=8) as running:
        yield running


@pytest.fixture(scope="module")
def address(embedders):
    with running_embedder(embedders["calibrated"]) as running, listening(running) as own:
        yield own


def test_all_types_are_made_from_one_vector(service, embedders):
    embedder = embedders["calibrated"]
    body = {"texts": MIXED, "input_type": "search_query", "embedding_types": TYPES, "model": "any", "priority": 3}
    response = ask(service, "/v2/embed", json=body)
    answer = response.json()
    assert answer.keys() == {"id", "response_type", "embeddings", "texts", "meta"}
    assert answer["id"] == response.headers["X-Request-Id"] and answer["response_type"] == "embeddings_by_type"
    assert answer["texts"] == MIXED and list(answer["embeddings"]) == TYPES
    tokens = sum(map(len, embedder.backend.text_encoder.encode(MIXED, "query")))
    assert answer["meta"]["billed_units"] == {"input_tokens": tokens}
    assert answer["meta"]["warnings"] == ["1 of 7 texts were too long and were cut, the first of them texts[6]"]
    floats, ranges = answer["embeddings"]["float"], embedder.int8_ranges
    np.testing.assert_allclose(floats, embedder.encode_queries(MIXED), atol=1e-5)
    for place, vector in enumerate(floats):
        own = {name: answer["embeddings"][name][place] for name in TYPES}
        assert list(struct.unpack("<32f", b64decode(own["base64"], validate=True))) == vector
        steps = [
            (x - low) / (high - low) * 255 for x, low, high in zip(vector, ranges.minimum, ranges.maximum, strict=True)
        ]
        for level, step in zip(own["int8"], steps, strict=True):
            assert -128 <= level <= 127 and abs(level + 128 - min(max(step - 0.5, 0), 255)) <= 0.51
        assert own["uint8"] == [level + 128 for level in own["int8"]]
        bits = "".join("1" if x > 0 else "0" for x in vector)
        assert own["ubinary"] == [int(bits[start : start + 8], 2) for start in range(0, 32, 8)]
        assert own["binary"] == [byte - 128 for byte in own["ubinary"]]


def test_without_types_vectors_are_floats(service, embedders):
    for types in ({}, {"embedding_types": []}, {"embedding_types": None}):
        answer = ask(service, "/v2/embed", json={"texts": ["Paris"], **types}).json()
        assert list(answer["embeddings"]) == ["float"] and "warnings" not in answer["meta"]
        np.testing.assert_allclose(answer["embeddings"]["float"], embedders["calibrated"].encode(["Paris"]), atol=1e-5)


def test_the_first_version_gives_a_list_where_no_types_are_asked_for(service, embedders):
    answer = ask(service, "/v1/embed", json={"texts": ["Paris"], "input_type": "clustering"}).json()
    assert answer["response_type"] == "embeddings_floats"
    expected = embedders["calibrated"].encode(["Paris"], kind="clustering")
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)
    answer = ask(service, "/v1/embed", json={"texts": ["Paris"], "embedding_types": ["ubinary"]}).json()
    assert answer["response_type"] == "embeddings_by_type" and list(answer["embeddings"]) == ["ubinary"]


def test_a_long_text_is_cut_as_truncate_and_max_tokens_say(service, embedders):
    embedder, text = embedders["calibrated"], "the " * 100 + "water " * 100
    for keys, kept in (
        ({}, "the " * 62),
        ({"truncate": "END"}, "the " * 62),
        ({"truncate": "START"}, "water " * 62),
        ({"truncate": "START", "max_tokens": 6}, "water water water water"),
        ({"max_tokens": 3}, "the"),
    ):
        answer = ask(service, "/v2/embed", json={"texts": [text], **keys}).json()
        np.testing.assert_allclose(answer["embeddings"]["float"], embedder.encode([kept]), atol=1e-5)
        assert answer["meta"]["warnings"]
    response = ask(service, "/v2/embed", json={"texts": ["a", text], "truncate": "NONE"})
    assert response.status_code == 422 and response.json()["message"].startswith("texts[1]: longer than 64 tokens")
    assert ask(service, "/v2/embed", json={"texts": ["a"], "truncate": "NONE"}).status_code == 200


def test_a_wrong_request_is_named_with_its_place(service):
    for body, words, status in (
        ({}, "texts: missing", 422),
        ({"texts": []}, "texts: expected at least one text", 400),
        ({"texts": "a"}, "texts: ", 422),
        ({"texts": ["a", None]}, "texts[1]: ", 422),
        ({"texts": [[1, 2]]}, "texts[0]: ", 422),
        ({"texts": ["a"] * 9}, "texts: at most 8 are taken", 422),
        ({"texts": ["a"], "images": ["data:"]}, "images: ", 422),
        ({"texts": ["a"], "inputs": []}, "inputs: ", 422),
        ({"texts": ["a"], "embedding_types": ["int4"]}, "embedding_types[0]: ", 422),
        ({"texts": ["a"], "embedding_types": ["float"] * 7}, "embedding_types: ", 422),
        ({"texts": ["a"], "embedding_types": "float"}, "embedding_types: ", 422),
        ({"texts": ["a"], "output_dimension": 64}, "output_dimension: this model's vectors have 32 numbers", 422),
        ({"texts": ["a"], "output_dimension": False}, "output_dimension: ", 422),
        ({"texts": ["a"], "output_dimension": 12, "embedding_types": ["binary"]}, "binary vectors have eight", 422),
        ({"texts": ["a"], "output_dimension": 8, "embedding_types": ["int8"]}, "the vectors have 8 numbers", 422),
        ({"texts": ["a"], "max_tokens": 0}, "max_tokens: ", 422),
        ({"texts": ["a"], "max_tokens": 2}, "max_length 2 is too small", 422),
        ({"texts": ["a"], "truncate": "LEFT"}, "truncate: ", 422),
        ({"texts": ["a"], "input_type": "image"}, "input_type: this model has no prompt 'image'", 422),
        ({"texts": ["a"], "prompt_name": "query"}, "prompt_name: this server does not know the key", 422),
    ):
        response = ask(service, "/v2/embed", json=body)
        answer = response.json()
        assert response.status_code == status and answer["message"].startswith(words), (body, answer)
        assert answer["message"] == answer["error"]


def test_int8_needs_the_ranges_of_the_model(embedders):
    with running_embedder(embedders["dense"]) as service:
        for name in ("int8", "uint8"):
            response = ask(service, "/v2/embed", json={"texts": ["a"], "embedding_types": ["float", name]})
            assert response.status_code == 422
            assert response.json()["message"].startswith("embedding_types: int8 and uint8 need the model's int8_ranges")


# ---- Cohere's clients -----------------------------------------------------------------------------------


def test_the_client_gets_every_type(address, embedders):
    client = cohere.ClientV2(api_key="any", base_url=address)
    texts, embedder = ["Fever and cough", "水在一百度时沸腾。", "🐼"], embedders["calibrated"]
    answer = client.embed(model="any", texts=texts, input_type="search_document", embedding_types=TYPES)
    np.testing.assert_allclose(answer.embeddings.float_, embedder.encode_documents(texts), atol=1e-5)
    assert np.shape(answer.embeddings.int8) == np.shape(answer.embeddings.uint8) == (3, 32)
    assert np.shape(answer.embeddings.binary) == np.shape(answer.embeddings.ubinary) == (3, 4)
    assert answer.texts == texts and answer.meta.billed_units.input_tokens > 0
    assert answer.embeddings.base64 is not None
    cut = client.embed(
        model="any", texts=texts, input_type="search_query", output_dimension=8, embedding_types=["float"]
    )
    np.testing.assert_allclose(cut.embeddings.float_, embedder.encode_queries(texts, dim=8), atol=1e-5)


def test_the_asynchronous_client_gets_each_request_its_own_vectors(address, embedders):
    texts = [f"text {number}" for number in range(12)]

    async def all_at_once():
        async with cohere.AsyncClientV2(api_key="any", base_url=address) as client:
            asked = [client.embed(model="any", texts=[text], input_type="search_query", embedding_types=["float"])
                     for text in texts]  # fmt: skip
            return await asyncio.gather(*asked)

    found = [answer.embeddings.float_[0] for answer in asyncio.run(all_at_once())]
    np.testing.assert_allclose(found, embedders["calibrated"].encode_queries(texts), atol=1e-5)


def test_the_older_client_joins_the_answers_of_its_batches(address, embedders):
    texts = [f"text {number}" for number in range(100)]  # it sends 96 at a time
    client = cohere.Client(api_key="any", base_url=address)
    answer = client.embed(texts=texts, input_type="search_document")
    np.testing.assert_allclose(answer.embeddings, embedders["calibrated"].encode_documents(texts), atol=1e-5)
    assert answer.texts == texts and answer.response_type == "embeddings_floats"


def test_the_client_raises_its_own_errors(address):
    client = cohere.ClientV2(api_key="any", base_url=address)
    with pytest.raises(cohere.UnprocessableEntityError, match="output_dimension: this model's vectors have 32 numbers"):
        client.embed(model="any", texts=["a"], input_type="search_query", output_dimension=64)
