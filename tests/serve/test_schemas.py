import json

import numpy as np
import pytest

from rag_retrieval.serve.http import RequestError
from rag_retrieval.serve.schemas import RerankTask, document_answer, limited_request, parse_request, text_answer

SCHEMA = limited_request(4)


def parsed(**fields) -> RerankTask:
    return parse_request(json.dumps(fields).encode(), SCHEMA, 20)


def refused(body: bytes, schema=SCHEMA) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(body, schema, 20)
    return caught.value


def test_the_request_of_cohere_s_second_version():
    task = parsed(model="rerank-v3.5", query="q", documents=["a", "b"], top_n=1, max_tokens_per_doc=7, priority=3)
    assert task == RerankTask("q", ["a", "b"], top_n=1, max_document_tokens=7)


def test_the_request_of_cohere_s_first_version():
    task = parsed(query="q", documents=[{"text": "a", "x": 1}, "b"], return_documents=True, rank_fields=["text"])
    assert task == RerankTask("q", ["a", "b"], return_documents=True)


def test_the_request_of_jina():
    task = parsed(model="m", query={"text": "q"}, documents=[{"text": "a"}], top_n=3, return_documents=False)
    assert task == RerankTask("q", ["a"], top_n=3)


def test_the_request_of_text_embeddings_inference():
    task = parsed(
        query="q", texts=["a"], raw_scores=True, return_text=True, truncate=False, truncation_direction="Right"
    )
    assert task == RerankTask("q", ["a"], as_texts=True, return_documents=True, raw_scores=True, truncate=False)


def test_the_request_of_vllm():
    task = parsed(model="m", query="q", documents=["a"], top_n=0, max_tokens_per_doc=0, use_activation=False, user="u",
                  truncate_prompt_tokens=-1, request_id="r", priority=0)  # fmt: skip
    assert task == RerankTask("q", ["a"], raw_scores=True)


def test_a_key_that_changes_the_result_does_so_in_both_shapes():
    for key, value, name, expected in (
        ("top_n", 2, "top_n", 2),
        ("raw_scores", True, "raw_scores", True),
        ("use_activation", False, "raw_scores", True),
        ("truncate", False, "truncate", False),
        ("truncation", False, "truncate", False),
        ("return_documents", True, "return_documents", True),
        ("return_text", True, "return_documents", True),
        ("max_tokens_per_doc", 5, "max_document_tokens", 5),
    ):
        for shape in ("documents", "texts"):
            task = parsed(**{"query": "q", shape: ["a"], key: value})
            assert getattr(task, name) == expected != getattr(parsed(**{"query": "q", shape: ["a"]}), name), key


def test_a_key_that_cannot_be_honoured_is_refused_in_both_shapes_and_null_is_as_absent():
    for key, value in (
        ("truncation_direction", "Left"),
        ("truncation_side", "left"),
        ("truncate_prompt_tokens", 100),
        ("max_tokens_per_query", 10),
        ("max_chunks_per_doc", 10),
        ("rank_fields", ["title"]),
        ("top_k", 3),
        ("instruction", "find"),
        ("top_m", 3),
    ):
        for shape in ("documents", "texts"):
            error = refused(json.dumps({"query": "q", shape: ["a"], key: value}).encode())
            assert error.status == 422 and error.message.startswith(key), key
        if key not in ("instruction", "top_m"):
            assert parsed(query="q", documents=["a"], **{key: None}) == RerankTask("q", ["a"])


def test_a_wrong_field_is_named_with_its_position():
    for fields, place in (
        ({"query": "q"}, "expected either documents or texts, found neither"),
        ({"query": "q", "documents": [], "texts": []}, "expected either documents or texts, found both"),
        ({"documents": ["a"]}, "query: "),
        ({"query": 1, "documents": ["a"]}, "query: "),
        ({"query": "q", "documents": "a"}, "documents: "),
        ({"query": "q", "texts": {"a": 1}}, "texts: "),
        ({"query": "q", "documents": ["a", None]}, "documents[1]: "),
        ({"query": "q", "texts": ["a", "b", {"body": "c"}]}, "texts[2]: "),
        ({"query": "q", "texts": ["a", "b", 3]}, "texts[2]: "),
        ({"query": "q", "documents": ["a"] * 5}, "documents: at most 4 "),
        ({"query": "q" * 21, "documents": ["a"]}, "query: found 21 characters"),
        ({"query": "q", "documents": ["a", "b" * 21]}, "documents[1]: found 21 characters"),
        ({"query": "q", "documents": [], "top_n": -1}, "top_n: "),
        ({"query": "q", "documents": [], "top_n": 1.5}, "top_n: "),
        ({"query": "q", "documents": [], "top_n": True}, "top_n: "),
        ({"query": "q", "documents": [], "return_documents": "yes"}, "return_documents: "),
        ({"query": "q", "texts": [], "truncate": 1}, "truncate: "),
        ({"query": "q", "documents": [], "model": [1]}, "model: "),
    ):
        error = refused(json.dumps(fields).encode())
        assert error.status == 422 and error.message.startswith(place), (fields, error.message)


def test_what_is_no_json_is_a_bad_request():
    for body in (b"", b"{", b"\xff\xfe\xfa", b'{"query": "\\ud800", "texts": []}', b'{"a": ' + b"9" * 5000 + b"}"):
        assert refused(body).status == 400
    deep = b'{"query": "q", "texts": ' + b"[" * 300 + b"]" * 300 + b', "pad": "' + b" " * 10_000 + b'"}'
    assert refused(deep).status == 400, "too deep for the parser"


def test_json_that_is_no_object_is_refused():
    for body in (b"[]", b'"q"', b"null", b"3"):
        error = refused(body)
        assert error.status == 422 and "expected an object with query" in error.message


def test_a_hostile_body_is_refused_before_its_values_become_objects_of_python():
    """Of four megabytes each: json.loads takes 0.3 s for the first, this a hundredth."""
    for body, reason in (
        (b'{"query": "q", "documents": [' + b"[]," * 1_300_000 + b"[]]}", "too many lists"),
        (b'{"query": "q", "documents": ["a"], "model": [' + b"[]," * 1_300_000 + b"[]]}", "too many lists"),
        (b'{"query": "q", "documents": [' + b'"",' * 1_300_000 + b'""]}', "at most 4"),
        (b'{"query": "q", "documents": [' + b"1," * 2_000_000 + b"1]}", "documents[0]"),
        (b'{"query": "q", ' + b",".join(b'"%d":1' % key for key in range(300_000)) + b"}", "300000 keys"),
    ):
        error = refused(body)
        assert error.status == 422 and reason in error.message and len(error.message) < 200


def test_answers_are_ordered_by_logits_and_cut_to_top_n():
    task = RerankTask("q", ["a", "b", "c"], top_n=2, return_documents=True)
    logits, shown = np.array([20, 40, 30], np.float32), np.ones(3, np.float32)
    assert text_answer(task, logits, shown) == [
        {"index": 1, "score": 1.0, "text": "b"},
        {"index": 2, "score": 1.0, "text": "c"},
    ]
    answer = document_answer(task, logits, shown, "sigmoid", 17, [0, 2], "m", "id")
    assert answer["results"][0] == {"index": 1, "relevance_score": 1.0, "document": {"text": "b"}}
    assert (answer["score_type"], answer["usage"]["total_tokens"], answer["id"]) == ("sigmoid", 17, "id")
    assert "2 of 3 documents" in answer["meta"]["warnings"][0] and "documents[0]" in answer["meta"]["warnings"][0]
