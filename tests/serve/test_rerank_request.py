import json

import pytest

from rag_retrieval.serve.refusal import Refusal
from rag_retrieval.serve.rerank_request import RerankRequest, TextLimits, parse_request

LIMITS = TextLimits(documents=4, characters=20)


def parsed(**fields) -> RerankRequest:
    return parse_request(json.dumps(fields).encode(), LIMITS)


def test_the_request_of_cohere_s_second_version():
    request = parsed(model="rerank-v3.5", query="q", documents=["a", "b"], top_n=1, max_tokens_per_doc=7, priority=3)
    assert request == RerankRequest("q", ["a", "b"], text_shape=False, top_n=1, max_document_tokens=7)


def test_the_request_of_cohere_s_first_version():
    request = parsed(query="q", documents=[{"text": "a"}, "b"], return_documents=True, rank_fields=["text"])
    assert request == RerankRequest("q", ["a", "b"], text_shape=False, return_documents=True)


def test_the_request_of_jina():
    request = parsed(model="m", query={"text": "q"}, documents=[{"text": "a"}], top_n=3, return_documents=False)
    assert request == RerankRequest("q", ["a"], text_shape=False, top_n=3)


def test_the_request_of_text_embeddings_inference():
    request = parsed(
        query="q", texts=["a"], raw_scores=True, return_text=True, truncate=False, truncation_direction="Right"
    )
    assert request == RerankRequest("q", ["a"], text_shape=True, return_documents=True, raw_scores=True, truncate=False)


def test_keys_that_are_null_are_as_absent():
    empty = dict.fromkeys(("texts", "top_n", "return_documents", "max_tokens_per_doc", "rank_fields"))
    assert parsed(query="q", documents=[], **empty) == RerankRequest("q", [], text_shape=False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"query": "q"}, "expected either documents or texts, found neither"),
        ({"query": "q", "documents": [], "texts": []}, "expected either documents or texts, found both"),
        ({"documents": ["a"]}, 'query: expected a string or an object with "text", found nothing'),
        ({"query": 1, "documents": ["a"]}, 'query: expected a string or an object with "text", found a number'),
        ({"query": "q", "documents": "a"}, "documents: expected a list, found a string"),
        ({"query": "q", "texts": {"a": 1}}, "texts: expected a list, found an object"),
        (
            {"query": "q", "documents": ["a", None]},
            'documents[1]: expected a string or an object with "text", found nothing',
        ),
        (
            {"query": "q", "texts": ["a", "b", {"body": "c"}]},
            'texts[2]: expected a string or an object with "text", found an object whose "text" is nothing',
        ),
        ({"query": "q", "documents": ["a"] * 5}, "documents: found 5, at most 4 are taken; send them in parts"),
        ({"query": "q" * 21, "documents": []}, "query: found 21 characters, at most 20 are taken; cut it"),
        ({"query": "q", "texts": ["a", "b" * 21]}, "texts[1]: found 21 characters, at most 20 are taken; cut it"),
        ({"query": "q", "documents": ["\ud800"]}, "documents[0]: holds half a surrogate pair, which is no text"),
        ({"query": "q", "documents": [], "top_n": 0}, "top_n: expected a whole number of at least 1, found 0"),
        ({"query": "q", "documents": [], "top_n": 1.5}, "top_n: expected a whole number of at least 1, found 1.5"),
        (
            {"query": "q", "documents": [], "top_n": True},
            "top_n: expected a whole number of at least 1, found true or false",
        ),
        (
            {"query": "q", "documents": [], "max_tokens_per_doc": "9"},
            "max_tokens_per_doc: expected a whole number of at least 1, found a string",
        ),
        ({"query": "q", "documents": [], "return_documents": 1}, "return_documents: expected true or false, found a"),
        ({"query": "q", "texts": [], "truncate": "no"}, "truncate: expected true or false, found a string"),
        ({"query": "q", "documents": [], "rank_fields": ["title"]}, "rank_fields: ['text'] is the one value"),
        ({"query": "q", "texts": [], "truncation_direction": "Left"}, "truncation_direction: 'right' is the one value"),
    ],
)
def test_a_wrong_field_is_named_with_its_position_and_what_was_found(fields, message):
    with pytest.raises(Refusal) as caught:
        parsed(**fields)
    assert caught.value.status == 422
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_is_a_bad_request(body):
    with pytest.raises(Refusal, match="the body is no JSON") as caught:
        parse_request(body, LIMITS)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body, found", [(b"[]", "a list"), (b'"q"', "a string"), (b"null", "nothing"), (b"3", "a number")]
)
def test_json_that_is_no_object_is_refused(body, found):
    with pytest.raises(Refusal, match=f"found {found}") as caught:
        parse_request(body, LIMITS)
    assert caught.value.status == 422
