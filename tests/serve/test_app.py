"""The application over ASGI, in this process, with a real tiny model."""

import asyncio
import copy
import gzip
import json
import threading

import httpx
import numpy as np
import pytest
from serve_samples import (
    GatedBackend,
    call_asgi,
    client_of,
    random_documents,
    running_service,
    skip_time,
    wait_until,
)

from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.models.calibration import Calibration

QUERY = "capital of France"
DOCUMENTS = ["Paris is the capital of France.", "Bread and butter", "", "the river Seine"]
TWO_TEXTS = {"query": QUERY, "texts": ["Paris", "Seine"]}


def ask(service, path: str = "/rerank", method: str = "POST", **options) -> httpx.Response:
    async def one():
        async with client_of(service) as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())


def metric(service, name: str, **labels) -> float | None:
    service.metrics.refresh()
    return service.metrics.registry.get_sample_value(f"rag_retrieval_{name}", labels)


@pytest.fixture
def service(backend):
    with running_service(backend) as running:
        yield running


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_answered_as_cohere_and_jina_do(service, backend, path):
    response = ask(service, path, json={"query": QUERY, "documents": DOCUMENTS, "top_n": 3, "return_documents": True})
    expected = Reranker.from_backend(backend).rerank(QUERY, DOCUMENTS, top_k=3, normalize=True)
    body = response.json()
    assert response.status_code == 200
    assert [entry["index"] for entry in body["results"]] == [result.document_index for result in expected]
    assert [entry["document"] for entry in body["results"]] == [{"text": result.text} for result in expected]
    scores = [entry["relevance_score"] for entry in body["results"]]
    assert scores == pytest.approx([result.score for result in expected], abs=1e-6)
    pairs = backend.pair_encoder.encode([(QUERY, text) for text in DOCUMENTS if text])
    assert body["usage"]["total_tokens"] == body["meta"]["tokens"]["input_tokens"] == sum(map(len, pairs))
    assert body["model"] == "tiny" and body["id"] == response.headers["X-Request-Id"]
    assert "warnings" not in body["meta"]


def test_documents_come_back_only_where_asked(service):
    results = ask(service, json={"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert len(results) == 4 and all(entry.keys() == {"index", "relevance_score"} for entry in results)
    assert results[-1] == {"index": 2, "relevance_score": 0.0}


@pytest.mark.parametrize("raw", [False, True])
def test_texts_are_answered_as_text_embeddings_inference_does(service, backend, raw):
    response = ask(service, json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": raw, "return_text": True})
    expected = Reranker.from_backend(backend).rerank(QUERY, DOCUMENTS, normalize=not raw)
    assert [(entry["index"], entry["text"]) for entry in response.json()] == [
        (result.document_index, result.text) for result in expected
    ]
    scores = [entry["score"] for entry in response.json()]
    assert scores == pytest.approx([result.score for result in expected], abs=1e-5)


def test_equal_texts_are_computed_once_and_keep_the_order_of_the_request(backend):
    """Each pair gets another score here, as equal pairs may on some CPUs."""
    numbered = copy.copy(backend)
    numbered.score = lambda pairs, batch_size: np.arange(len(pairs), dtype=np.float32)
    with running_service(numbered) as service:
        results = ask(service, json={"query": QUERY, "texts": ["same", "", "same", "other", "", "same"]}).json()
    assert [entry["index"] for entry in results] == [3, 0, 2, 5, 1, 4]
    assert metric(service, "items_total", model="reranker") == 2


def test_the_order_is_that_of_the_logits_also_where_probabilities_are_equal(backend):
    saturated = copy.copy(backend)
    saturated.score = lambda pairs, batch_size: np.array([18, 25, 21], np.float32)
    with running_service(saturated) as service:
        response = ask(service, json={"query": QUERY, "documents": ["a", "b", "c"]})
        best = ask(service, json={"query": QUERY, "texts": ["a", "b", "c"], "top_n": 1})
    assert [entry["index"] for entry in response.json()["results"]] == [1, 2, 0]
    assert {entry["relevance_score"] for entry in response.json()["results"]} == {1.0}
    assert [entry["index"] for entry in best.json()] == [1]


def test_an_answer_says_what_its_scores_are(backend):
    calibrated = copy.copy(backend)
    calibrated.calibration = Calibration(2.0, 0.5, "dev", 10)
    kinds = ((backend, True, "logit"), (backend, False, "sigmoid"), (calibrated, False, "calibrated"))
    for served, raw, expected in kinds:
        with running_service(served) as service:
            response = ask(service, json={"query": QUERY, "documents": ["a"], "raw_scores": raw})
            texts = ask(service, json={"query": QUERY, "texts": ["a"], "raw_scores": raw})
            info = ask(service, "/info", "GET").json()
        assert response.json()["score_type"] == texts.headers["X-Score-Type"] == expected
        assert raw or info["score_type"] == expected


def test_no_documents_give_no_results(service):
    assert ask(service, json={"query": QUERY, "documents": []}).json()["results"] == []
    assert ask(service, json={"query": QUERY, "texts": []}).json() == []


def test_documents_that_were_cut_are_named(service):
    response = ask(service, json={"query": QUERY, "documents": ["short", "Paris " * 200]})
    assert response.json()["meta"]["warnings"] == [
        "1 of 2 documents were too long and were cut, the first of them documents[1]"
    ]
    assert metric(service, "truncated_texts_total", model="reranker") == 1


def test_concurrent_requests_get_their_own_scores(service, backend):
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(1, 8, 30).tolist(), 60]
    requests = [(" ".join(random_documents(generator, 1)), random_documents(generator, size)) for size in sizes]

    async def all_at_once():
        async with client_of(service, timeout=60) as client:
            bodies = [{"query": query, "texts": texts, "raw_scores": True} for query, texts in requests]
            return await asyncio.gather(*[client.post("/rerank", json=body) for body in bodies])

    responses = asyncio.run(all_at_once())
    for (query, texts), response in zip(requests, responses, strict=True):
        alone = [float(backend.scorer.compute_score([[query, text]])) for text in texts]
        answered = {entry["index"]: entry["score"] for entry in response.json()}
        assert [answered[place] for place in range(len(texts))] == pytest.approx(alone, abs=1e-5)
    batches = metric(service, "batch_items_count", model="reranker")
    assert batches < metric(service, "items_total", model="reranker") == sum(sizes)


def test_an_error_has_one_body_on_every_way(service):
    responses = [
        ask(service, json={"query": QUERY}),
        ask(service, content=b"{"),
        ask(service, "/nowhere"),
        ask(service, method="GET"),
    ]
    assert [response.status_code for response in responses] == [422, 400, 404, 405]
    kinds = ["validation", "malformed", "not_found", "method_not_allowed"]
    for response, kind in zip(responses, kinds, strict=True):
        body = response.json()
        assert body.keys() == {"message", "error", "error_type", "id"}
        assert body["message"] == body["error"] and body["error_type"] == kind
    assert responses[3].headers["Allow"] == "POST"
    assert ask(service, "/rerank/", json=TWO_TEXTS).status_code == 404, "a redirect would go where Host says"


def test_a_body_that_is_no_json_by_its_headers_is_refused(service):
    body = json.dumps(TWO_TEXTS).encode()
    for headers, expected in (
        ({}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ):
        response = ask(service, content=gzip.compress(body) if "Content-Encoding" in headers else body, headers=headers)
        assert response.status_code == expected, headers
        assert expected == 200 or response.json()["error_type"] == "unsupported_media_type"


def test_the_rest_of_a_refused_body_is_read_only_so_far(backend):
    taken = 0

    async def chunks():
        nonlocal taken
        while True:
            taken += 1000
            yield b" " * 1000

    with running_service(backend, token=b"secret", max_body_bytes=10_000) as service:
        endless = ask(service, content=chunks())
        declared = ask(service, content=b" " * 30_000)
        small = ask(service, content=b" " * 15_000)
    assert [response.status_code for response in (endless, declared, small)] == [401] * 3
    assert endless.headers["Connection"] == declared.headers["Connection"] == "close" and taken < 30_000
    assert "Connection" not in small.headers, "it was read to its end"


def test_small_requests_are_not_stuck_behind_large_ones_that_are_tokenized(backend, monkeypatch):
    """A large request is tokenized piece by piece; the gate stands before its second piece."""
    with running_service(backend, max_characters=60_000) as service:
        encode, gate, pieces = service.endpoints[0].model.encode, threading.Event(), []

        def gated(task, texts, encoded):
            if task.query == "large":
                pieces.append(len(texts))
                if len(pieces) > 8:
                    assert gate.wait(60)
            return encode(task, texts, encoded)

        monkeypatch.setattr(service.endpoints[0].model, "encode", gated)

        async def ask_all():
            async with client_of(service, timeout=60) as client:
                large = {"query": "large", "texts": [f"{number} " + "Paris " * 8000 for number in range(8)]}
                tasks = [asyncio.create_task(client.post("/rerank", json=large)) for _ in range(2)]
                while len(pieces) < 5:
                    await asyncio.sleep(0.001)
                answered = await client.post("/rerank", json=TWO_TEXTS)
                done_before = len(pieces)
                gate.set()
                return answered, done_before, await asyncio.gather(*tasks)

        answered, done_before, large = asyncio.run(ask_all())
        assert answered.status_code == 200 and done_before < 16
        assert [response.status_code for response in large] == [200, 200] and sum(pieces) == 16


def test_a_request_that_is_over_is_not_tokenized_to_its_end(backend, monkeypatch):
    """Its time ends while the third piece is tokenized."""
    with running_service(backend, timeout=600) as service:
        encode, pieces, third, gate = service.endpoints[0].model.encode, [], threading.Event(), threading.Event()

        def held(task, texts, encoded):
            pieces.append(len(texts))
            if len(pieces) == 3:
                third.set()
                assert gate.wait(60)
            return encode(task, texts, encoded)

        monkeypatch.setattr(service.endpoints[0].model, "encode", held)
        body = {"query": QUERY, "texts": [f"{number}" + " a" * 30_000 for number in range(40)]}

        async def time_ends() -> httpx.Response:
            async with client_of(service) as client:
                request = asyncio.create_task(client.post("/rerank", json=body))
                await asyncio.to_thread(third.wait, 60)
                skip_time(600)
                return await request

        assert asyncio.run(time_ends()).status_code == 504
        gate.set()
        assert ask(service, json=TWO_TEXTS).status_code == 200
        assert len(pieces) == 4, "three of the first request and one of the second"


def test_text_that_waits_to_be_tokenized_counts_towards_the_wait_for_a_turn(service, monkeypatch):
    service.admission.longest_wait = 15
    monkeypatch.setattr(service.texts, "expected_seconds", lambda first: 0 if first else 25)
    response = ask(service, json=TWO_TEXTS)
    assert response.status_code == 429 and response.headers["Retry-After"] == "25"
    monkeypatch.undo()
    assert ask(service, json=TWO_TEXTS).status_code == 200


def test_a_large_request_is_refused_where_a_small_one_would_be_served_in_time(service, monkeypatch):
    """By its own tokens: what others have of them is computed while it takes its turns."""
    monkeypatch.setattr(service.batchers["reranker"], "expected_seconds", lambda tokens=1, first=False: tokens * 20)
    assert ask(service, json={"query": QUERY, "texts": ["Paris"]}).status_code == 200
    large = ask(service, json={"query": QUERY, "texts": [f"{number} Paris" for number in range(20)]})
    assert large.status_code == 429 and int(large.headers["Retry-After"]) > 15


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_its_size(backend):
    async def chunks():
        for _ in range(3):
            yield b" " * 400

    with running_service(backend, max_body_bytes=1000) as service:
        assert ask(service, content=b" " * 1001).status_code == 413
        assert ask(service, content=chunks()).status_code == 413
        lying = ask(service, content=chunks(), headers={"Content-Length": "5"})
        assert lying.status_code == 413 and "larger than 1000 bytes" in lying.json()["message"]
        assert ask(service, content=b" " * 1000).status_code == 400


def test_a_body_that_does_not_arrive_in_time_is_given_up(backend):
    async def half():
        yield b"{"
        skip_time(600)
        await asyncio.Event().wait()

    with running_service(backend, timeout=600) as service:
        response = ask(service, content=half())
    assert response.status_code == 408 and response.json()["error_type"] == "too_slow"


def test_a_token_is_asked_for_everywhere_but_for_health(backend):
    with running_service(backend, token=b"secret") as service:
        refused = ask(service, json=TWO_TEXTS)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert ask(service, json=TWO_TEXTS, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert ask(service, "/metrics", "GET").status_code == 401
        let_in = {"Authorization": "Bearer secret"}
        assert ask(service, json=TWO_TEXTS, headers=let_in).status_code == 200
        assert ask(service, "/metrics", "GET", headers=let_in).status_code == 200
        assert ask(service, "/health", "GET").json() == {"status": "ok", "models": {"reranker": "tiny"}}


def test_an_error_inside_is_answered_with_its_id_alone(service, backend, monkeypatch, caplog):
    def broken(pairs, batch_size):
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(backend, "score", broken)
    response = ask(service, json=TWO_TEXTS)
    assert response.status_code == 500
    assert "secret" not in response.text and "Traceback" not in response.text
    assert response.json()["id"] in caplog.text and "secret of the server" in caplog.text
    monkeypatch.undo()
    assert ask(service, json=TWO_TEXTS).status_code == 200


def test_a_request_whose_time_is_over_is_dropped(backend):
    gated = GatedBackend(backend)
    with running_service(gated, timeout=600) as service:

        async def three():
            async with client_of(service) as client:
                computing = asyncio.create_task(client.post("/rerank", json=TWO_TEXTS))
                await asyncio.to_thread(gated.entered.wait, 60)
                waiting = [asyncio.create_task(client.post("/rerank", json=TWO_TEXTS)) for _ in range(2)]
                while service.batchers["reranker"].waiting_items() < 4:
                    await asyncio.sleep(0.01)
                skip_time(600)
                return await asyncio.gather(computing, *waiting)

        responses = asyncio.run(three())
        assert [response.status_code for response in responses] == [504] * 3
        assert responses[0].json()["error_type"] == "timeout"
        assert metric(service, "queue_items", model="reranker") == metric(service, "requests_inside") == 0
        gated.gate.set()
    assert gated.calls == [2]  # what was computed already; the rest never is


def test_a_request_whose_client_has_gone_is_dropped_before_it_is_computed(backend):
    gated = GatedBackend(backend)
    with running_service(gated) as service:

        async def leave():
            gone, stays = asyncio.Event(), asyncio.Event()
            first = asyncio.create_task(call_asgi(service.app, TWO_TEXTS, stays))
            await asyncio.to_thread(gated.entered.wait, 60)
            second = asyncio.create_task(call_asgi(service.app, TWO_TEXTS | {"texts": list("abcde")}, gone))
            while service.batchers["reranker"].waiting_items() < 5:
                await asyncio.sleep(0.01)
            gone.set()
            await second
            assert service.batchers["reranker"].waiting_items() == 0
            gated.gate.set()
            return await first

        sent = asyncio.run(leave())
        assert sent[0]["status"] == 200
        assert metric(service, "requests_total", path="/rerank", status="499") == 1
    assert gated.calls == [2]


@pytest.mark.parametrize("bound", [{"queue_requests": 2}, {"queue_pairs": 5, "max_documents": 2}])
def test_a_full_queue_refuses_and_those_inside_are_still_answered(backend, bound):
    gated = GatedBackend(backend)
    with running_service(gated, **bound) as service:

        async def five():
            async with client_of(service) as client:
                inside = [asyncio.create_task(client.post("/rerank", json=TWO_TEXTS)) for _ in range(2)]
                while service.admission.documents < 4:
                    await asyncio.sleep(0.01)
                refused = [await client.post("/rerank", json=TWO_TEXTS) for _ in range(3)]
                gated.gate.set()
                return refused, await asyncio.gather(*inside), await client.post("/rerank", json=TWO_TEXTS)

        refused, answered, later = asyncio.run(five())
        assert [response.status_code for response in refused] == [429] * 3
        assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
        assert refused[0].json()["error_type"] == "overloaded"
        assert [response.status_code for response in [*answered, later]] == [200] * 3
        assert metric(service, "requests_total", path="/rerank", status="429") == 3


def test_a_stopping_server_refuses_what_is_new_and_finishes_what_is_inside(backend):
    gated = GatedBackend(backend)
    with running_service(gated) as service:

        async def stop():
            async with client_of(service) as client:
                inside = asyncio.create_task(client.post("/rerank", json=TWO_TEXTS))
                await asyncio.to_thread(gated.entered.wait, 60)
                service.admission.stopping = True
                refused, health = await client.post("/rerank", json=TWO_TEXTS), await client.get("/health")
                gated.gate.set()
                return await inside, refused, health

        inside, refused, health = asyncio.run(stop())
    assert [response.status_code for response in (inside, refused, health)] == [200, 503, 503]


def test_the_metrics_count_requests_pairs_and_tokens(service, backend):
    for _ in range(2):
        ask(service, json=TWO_TEXTS)
    ask(service, "/nowhere")
    text = ask(service, "/metrics", "GET").text
    tokens = 2 * sum(map(len, backend.pair_encoder.encode([(QUERY, "Paris"), (QUERY, "Seine")])))
    lines = text.splitlines()
    assert 'rag_retrieval_requests_total{path="/rerank",status="200"} 2.0' in lines
    assert 'rag_retrieval_requests_total{path="other",status="404"} 1.0' in lines
    assert 'rag_retrieval_items_total{model="reranker"} 4.0' in lines
    assert f'rag_retrieval_tokens_total{{model="reranker"}} {tokens}.0' in lines
    assert 'rag_retrieval_request_seconds_count{path="/rerank"} 2.0' in lines
    assert 'rag_retrieval_queue_items{model="reranker"} 0.0' in lines


def test_health_fails_when_the_scoring_thread_has_ended(service):
    service.batchers["reranker"].close()
    wait_until(lambda: not service.batchers["reranker"].is_alive)
    assert ask(service, "/health", "GET").status_code == 503


def test_what_is_served_is_told_with_the_keys_of_text_embeddings_inference(service):
    info = ask(service, "/info", "GET").json()
    (kind,) = info["model_type"]
    assert kind == "reranker" and info["model_type"][kind]["label2id"] == {"LABEL_0": 0}
    assert info["model_id"] == "tiny" and info["max_input_length"] == 64 and info["max_batch_tokens"] == 256
    assert info["max_client_batch_size"] == 1000 and info["max_concurrent_requests"] == 256
    assert info["auto_truncate"] is True and info["models"]["reranker"]["model_id"] == "tiny"
