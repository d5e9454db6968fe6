"""A real server on a free loopback port, in a thread of this process, and real clients."""

import json
import logging
import math
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from serve_samples import GatedBackend, answers, listening, running_service, wait_until

from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.serve import server as server_module
from rag_retrieval.serve.server import address_of, bound_socket

QUERY = "capital of France"
DOCUMENTS = ["Bread and butter", "Paris is the capital of France.", "the river Seine"]
TWO_TEXTS = {"query": QUERY, "texts": ["Paris", "Seine"]}


@pytest.fixture(scope="module")
def server(backend):
    with running_service(backend, token=b"secret", max_documents=3) as service, listening(service) as address:
        yield address


@pytest.fixture(scope="module")
def expected(backend):
    return Reranker.from_backend(backend).rerank(QUERY, DOCUMENTS, normalize=True)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_client_library_of_cohere_gets_its_answer(server, expected, version):
    cohere = pytest.importorskip("cohere")
    client = {"v1": cohere.Client, "v2": cohere.ClientV2}[version](api_key="secret", base_url=server)
    answer = client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [result.index for result in answer.results] == [result.document_index for result in expected][:2]
    scores = [result.relevance_score for result in answer.results]
    assert scores == pytest.approx([result.score for result in expected][:2], abs=1e-6)
    assert answer.id and answer.meta.tokens.input_tokens > 20


def test_the_client_library_of_cohere_gets_documents_back(server, expected):
    cohere = pytest.importorskip("cohere")
    documents = [{"text": text} for text in DOCUMENTS]
    client = cohere.Client(api_key="secret", base_url=server)
    answer = client.rerank(model="tiny", query=QUERY, documents=documents, return_documents=True)
    assert [result.document.text for result in answer.results] == [result.text for result in expected]


def test_the_client_library_of_cohere_raises_its_own_errors(server):
    cohere = pytest.importorskip("cohere")
    with pytest.raises(cohere.UnauthorizedError, match="Bearer TOKEN"):
        cohere.ClientV2(api_key="wrong", base_url=server).rerank(model="m", query="q", documents=["a"])
    with pytest.raises(cohere.UnprocessableEntityError, match="documents: at most 3 are taken"):
        cohere.ClientV2(api_key="secret", base_url=server).rerank(model="m", query="q", documents=["a"] * 4)


def test_a_connection_lives_on_after_a_body_that_was_refused(server):
    with httpx.Client(base_url=server, headers={"Authorization": "Bearer secret"}, timeout=60) as client:
        refused = client.post("/rerank", content=b" " * 6_000_000)
        assert refused.status_code == 413
        ports = {refused.extensions["network_stream"].get_extra_info("client_addr")}
        answered = client.post("/rerank", json=TWO_TEXTS)
        ports.add(answered.extensions["network_stream"].get_extra_info("client_addr"))
    assert answered.status_code == 200 and len(ports) == 1


def test_a_client_that_closes_its_connection_is_dropped_from_the_queue(backend):
    gated = GatedBackend(backend)
    body = json.dumps(TWO_TEXTS).encode()
    head = f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running_service(gated) as service, listening(service) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{address}/rerank", json=TWO_TEXTS, timeout=60)
        assert gated.entered.wait(60)
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))) as leaving:
            leaving.sendall(head + body)
            wait_until(lambda: service.batchers["reranker"].waiting_items() == 2)
        wait_until(lambda: service.batchers["reranker"].waiting_items() == 0 and service.admission.requests == 1)
        gated.gate.set()
        assert first.result(60).status_code == 200
    assert gated.calls == [2]


def test_a_server_that_stops_answers_what_is_inside_and_refuses_what_is_new(backend, caplog):
    caplog.set_level(logging.INFO, "rag_retrieval")
    gated = GatedBackend(backend)
    with running_service(gated) as service, listening(service) as address, ThreadPoolExecutor(1) as pool:
        inside = pool.submit(httpx.post, f"{address}/rerank", json=TWO_TEXTS, timeout=60)
        assert gated.entered.wait(60)
        service.admission.stopping = True
        refused = httpx.post(f"{address}/rerank", json=TWO_TEXTS, timeout=60)
        gated.gate.set()
        assert inside.result(60).status_code == 200
        assert refused.status_code == 503 and refused.json()["error_type"] == "stopping"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", timeout=60)


def test_a_port_in_use_is_an_error():
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose"):
            bound_socket("127.0.0.1", port)


def test_an_address_of_another_machine_is_an_error():
    with pytest.raises(OSError, match="cannot listen on 192.0.2.1 port 0: "):
        bound_socket("192.0.2.1", 0)


def test_an_address_is_written_as_an_url():
    with bound_socket("127.0.0.1", 0) as opened:
        assert address_of(opened) == f"http://127.0.0.1:{opened.getsockname()[1]}"


# ---- connections ----------------------------------------------------------------------------------------


def port_of(address: str) -> int:
    return int(address.rsplit(":")[-1])


def answer_to(address: str, request: bytes, half_close: bool = False) -> bytes:
    """Everything that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port_of(address)), timeout=60) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def rerank_bytes(body: dict, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = ["POST /rerank HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def test_malformed_http_gets_the_body_of_all_errors(server):
    head, _, body = answer_to(server, b"NOT HTTP AT ALL\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error_type"] == "malformed"


def test_a_client_that_has_closed_its_sending_half_gets_its_answer(backend):
    with running_service(backend) as service, listening(service) as address:
        answer = answer_to(address, rerank_bytes(TWO_TEXTS), half_close=True)
    assert b"HTTP/1.1 200 OK" in answer and b'"index":0' in answer


def test_silent_connections_give_way_to_those_that_ask(backend, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "most_connections", lambda: 5)
    monkeypatch.setattr(server_module, "LOG_SECONDS", 3600)
    monkeypatch.setattr(server_module.ClientConnection, "last_logged", -math.inf)
    with running_service(backend) as service, listening(service) as address:
        silent = [socket.create_connection(("127.0.0.1", port_of(address))) for _ in range(30)]
        assert httpx.post(f"{address}/rerank", json=TWO_TEXTS, timeout=60).status_code == 200
        silent[0].settimeout(60)
        with suppress(ConnectionError):
            assert silent[0].recv(1) == b""
        for connection in silent:
            connection.close()
    lines = [record for record in caplog.records if "without a request closed" in record.message]
    assert len(lines) == 1, "one line in LOG_SECONDS, whatever their number"


def test_a_connection_that_sends_no_request_in_time_is_closed(backend, monkeypatch):
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
    with running_service(backend) as service, listening(service) as address:
        for beginning in (b"", b"POST /rerank HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", port_of(address)), timeout=60) as connection:
                connection.sendall(beginning)
                with suppress(ConnectionError):
                    assert connection.recv(1) == b""
        wait_until(lambda: answers(address))  # a connection of this test may be too slow as well


def test_it_is_said_where_the_server_listens_once_it_does(backend, caplog):
    caplog.set_level(logging.INFO, "rag_retrieval.serve")
    reached = []

    class Reach(logging.Handler):
        def emit(self, record):
            if "listening on" in record.getMessage():
                with socket.create_connection(("127.0.0.1", port_of(record.getMessage()))):
                    reached.append(record.getMessage())

    handler = Reach()
    server_module.log.addHandler(handler)
    try:
        with running_service(backend) as service, listening(service):
            pass
    finally:
        server_module.log.removeHandler(handler)
    assert len(reached) == 1
