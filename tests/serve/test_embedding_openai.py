"""`/v1/embeddings`: the answers by hand, and OpenAI's own client on a running server."""

import asyncio
import struct
from base64 import b64decode

import numpy as np
import openai
import pytest
from serve_embedding_samples import MIXED, ask, running_embedder
from serve_samples import listening

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def service(embedders):
    with running_embedder(embedders["dense"], max_documents=8) as running:
        yield running


@pytest.fixture(scope="module")
def address(embedders):
    with running_embedder(embedders["dense"], token=b"secret") as running, listening(running) as own:
        yield f"{own}/v1"


def test_an_answer_has_a_vector_for_each_text_in_order(service, embedders):
    response = ask(service, PATH, json={"input": MIXED, "model": "any", "user": "someone"})
    body = response.json()
    assert body.keys() == {"object", "data", "model", "usage"}
    assert (response.status_code, body["object"], body["model"]) == (200, "list", "tiny")
    assert [entry.keys() for entry in body["data"]] == [{"object", "index", "embedding"}] * len(MIXED)
    assert [entry["index"] for entry in body["data"]] == list(range(len(MIXED)))
    assert {entry["object"] for entry in body["data"]} == {"embedding"}
    vectors = np.array([entry["embedding"] for entry in body["data"]])
    np.testing.assert_allclose(vectors, embedders["dense"].encode(MIXED), atol=1e-5)
    tokens = sum(map(len, embedders["dense"].backend.text_encoder.encode(MIXED)))
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert response.headers["X-Truncated"] == "1" and response.headers["Content-Type"] == "application/json"
    assert "X-Truncated" not in ask(service, PATH, json={"input": "a"}).headers


def test_base64_is_float32_with_the_lowest_byte_first(service):
    for dimensions in (None, 5):
        body = {"input": ["Paris", "水"], "dimensions": dimensions}
        floats = ask(service, PATH, json=body | {"encoding_format": "float"}).json()["data"]
        coded = ask(service, PATH, json=body | {"encoding_format": "base64"}).json()["data"]
        for own, expected in zip(coded, floats, strict=True):
            values = struct.unpack(f"<{dimensions or 32}f", b64decode(own["embedding"], validate=True))
            assert list(values) == pytest.approx(expected["embedding"], abs=1e-6)


def test_token_ids_may_stand_in_the_place_of_texts(service, embedders):
    encoder = embedders["dense"].backend.text_encoder.fast_tokenizer
    ids = [encoder.encode(text).ids for text in ("Paris", "the river")]
    expected = [
        entry["embedding"] for entry in ask(service, PATH, json={"input": ["Paris", "the river"]}).json()["data"]
    ]
    for given, vectors in ((ids, expected), (ids[0], expected[:1]), ([ids[0], "the river"], expected)):
        found = [entry["embedding"] for entry in ask(service, PATH, json={"input": given}).json()["data"]]
        np.testing.assert_allclose(found, vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"prompt_name": "query"}, "query"),
        ({"prompt_name": "clustering"}, "clustering"),
        ({"input_type": "search_query"}, "query"),
        ({"input_type": "query"}, "query"),
        ({"input_type": "search_document"}, "document"),
        ({"input_type": "passage"}, "document"),
        ({"input_type": "clustering"}, "clustering"),
        ({"prompt_name": None, "input_type": None}, None),
    ],
)
def test_a_prompt_of_the_model_is_chosen_by_its_name(service, embedders, keys, kind):
    (entry,) = ask(service, PATH, json={"input": "Paris", **keys}).json()["data"]
    np.testing.assert_allclose(entry["embedding"], embedders["dense"].encode("Paris", kind=kind), atol=1e-5)


def test_a_wrong_request_is_named_with_its_place(service):
    for body, words in (
        ({}, "input: missing"),
        ({"input": None}, "input: "),
        ({"input": 3}, "input: "),
        ({"input": []}, "input: expected at least one text"),
        ({"input": ["a", 3]}, "input[1]: "),
        ({"input": [1, "x"]}, "input[1]: "),
        ({"input": [1.5]}, "input[0]: "),
        ({"input": [True]}, "input[0]: "),
        ({"input": [[1, 2], [3, None]]}, "input[1][1]: "),
        ({"input": [[["a"]]]}, "input[0][0]: "),
        ({"input": [[{"text": "a"}]]}, "input[0][0]: "),
        ({"input": [5, 605]}, "input[1]: "),
        ({"input": [-1]}, "input[0]: "),
        ({"input": [10**40]}, "input[0]: "),
        ({"input": ["a"] * 9}, "input: at most 8 are taken"),
        ({"input": "a" * 100_001}, "input[0]: found 100001 characters"),
        ({"input": ["a", [1] * 100_001]}, "input[1]: at most 100000 are taken"),
        ({"input": "Paris " * 99, "truncate": False}, "input[0]: longer than 64 tokens"),
        ({"input": "a", "dimensions": 0}, "dimensions: "),
        ({"input": "a", "dimensions": -3}, "dimensions: "),
        ({"input": "a", "dimensions": 33}, "dimensions: this model's vectors have 32 numbers, found 33"),
        ({"input": "a", "dimensions": True}, "dimensions: "),
        ({"input": "a", "dimensions": "8"}, "dimensions: "),
        ({"input": "a", "dimensions": 8.5}, "dimensions: "),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format: "),
        ({"input": "a", "encoding_format": ["float"]}, "encoding_format: "),
        ({"input": "a", "user": 3}, "user: "),
        ({"input": "a", "truncate": "no"}, "truncate: "),
        ({"input": "a", "prompt_name": "poem"}, "prompt_name: this model has no prompt 'poem'; it knows query"),
        ({"input": "a", "input_type": "image"}, "input_type: this model has no prompt 'image'; it knows search_query"),
        ({"input": "a", "prompt_name": "query", "input_type": "query"}, "expected prompt_name or input_type"),
        ({"input": "a", "instruction": "find"}, "instruction: this server does not know the key"),
    ):  # fmt: skip
        response = ask(service, PATH, json=body)
        error = response.json()["error"]
        assert response.status_code == 400 and error["message"].startswith(words), (body, error)
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_a_model_without_dense_vectors_says_what_it_gives(embedders):
    with running_embedder(embedders["colbert"]) as service:
        response = ask(service, PATH, json={"input": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "tiny gives multi_vector, and this asks for dense"


def test_errors_of_the_server_have_the_shape_of_openai(embedders, monkeypatch):
    with running_embedder(embedders["dense"], token=b"secret", max_body_bytes=100) as service:
        headers = {"Authorization": "Bearer secret"}
        cases = [
            (ask(service, PATH, json={"input": "a"}), 401, "invalid_request_error", "invalid_api_key"),
            (ask(service, PATH, content=b"{", headers=headers), 400, "invalid_request_error", None),
            (ask(service, PATH, content=b" " * 101, headers=headers), 413, "invalid_request_error", None),
        ]
        monkeypatch.setattr(service.admission, "max_requests", 0)
        cases.append((ask(service, PATH, json={"input": "a"}, headers=headers), 429, "requests", "rate_limit_exceeded"))
        monkeypatch.undo()
        service.admission.stopping = True
        cases.append((ask(service, PATH, json={"input": "a"}, headers=headers), 503, "server_error", None))
    for response, status, kind, code in cases:
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (status, kind, code)


# ---- OpenAI's client ------------------------------------------------------------------------------------


def test_the_client_gets_the_vectors_of_the_embedder(address, embedders):
    client, embedder = openai.OpenAI(api_key="secret", base_url=address), embedders["dense"]
    texts = [text for text in MIXED if text]
    answer = client.embeddings.create(input=texts, model="tiny")  # asks for base64 and decodes it
    np.testing.assert_allclose([entry.embedding for entry in answer.data], embedder.encode(texts), atol=1e-5)
    assert answer.usage.prompt_tokens == sum(map(len, embedder.backend.text_encoder.encode(texts)))
    for given, expected in (("水", embedder.encode(["水"])), ([3, 4, 5], None), ([[3, 4, 5], [6]], None)):
        answer = client.embeddings.create(input=given, model="tiny", encoding_format="float", user="someone")
        assert len(answer.data) == (2 if isinstance(given[0], list) else 1)
        assert expected is None or np.allclose([answer.data[0].embedding], expected, atol=1e-5)
    cut = client.embeddings.create(input="Paris", model="tiny", dimensions=8, extra_body={"input_type": "search_query"})
    np.testing.assert_allclose(cut.data[0].embedding, embedder.encode_queries("Paris", dim=8), atol=1e-5)


def test_the_asynchronous_client_gets_each_request_its_own_vectors(address, embedders):
    texts = [f"text number {number} 第{number}" for number in range(20)]

    async def all_at_once():
        async with openai.AsyncOpenAI(api_key="secret", base_url=address) as client:
            asked = [client.embeddings.create(input=[text, text], model="tiny") for text in texts]
            return await asyncio.gather(*asked)

    answers = asyncio.run(all_at_once())
    found = np.array([[entry.embedding for entry in answer.data] for answer in answers])
    expected = embedders["dense"].encode(texts)
    np.testing.assert_allclose(found, np.stack([expected, expected], axis=1), atol=1e-5)


def test_the_client_raises_its_own_errors(address):
    client = openai.OpenAI(api_key="secret", base_url=address, max_retries=0)
    with pytest.raises(openai.BadRequestError, match="dimensions: this model's vectors have 32 numbers") as caught:
        client.embeddings.create(input="a", model="tiny", dimensions=64)
    assert caught.value.type == "invalid_request_error" and caught.value.code is None
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(api_key="wrong", base_url=address, max_retries=0).embeddings.create(input="a", model="tiny")
    assert caught.value.code == "invalid_api_key"
