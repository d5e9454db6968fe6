"""Several processes that share a port, with a real tiny model."""

import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from serve_samples import started, wait_until
from tiny_models import tiny_bert

from rag_retrieval.cli import main

pytestmark = pytest.mark.slow

TWO_TEXTS = {"query": "capital of France", "texts": ["Paris", "Seine"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("workers") / "model", head_labels=1))


def workers_of(server) -> list[psutil.Process]:
    """Without the process with which multiprocessing tracks resources."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def rerank(address: str) -> httpx.Response:
    return httpx.post(f"{address}/rerank", json=TWO_TEXTS, timeout=120)


def metric(address: str, line: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=120).text
    found = re.search(rf"^rag_retrieval_{re.escape(line)} (\S+)$", text, flags=re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_workers_share_a_port_count_together_are_replaced_and_stop_together(model):
    asked = 'requests_total{path="/rerank",status="200"}'
    with started("--model", model, "--workers", "2") as server:
        assert "with 2 workers" in server.log
        before = workers_of(server)
        assert len(before) == 2
        port = int(server.address.rsplit(":")[-1])

        # both take connections
        held = [httpx.Client(base_url=server.address, timeout=120) for _ in range(24)]
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda client: client.post("/rerank", json=TWO_TEXTS), held))
        assert {answer.status_code for answer in answers} == {200}
        # alone or in a batch with others, a score may differ in the last bit
        first, *others = ([(each["index"], each["score"]) for each in answer.json()] for answer in answers)
        expected = [(index, pytest.approx(score, rel=1e-5)) for index, score in first]
        assert all(other == expected for other in others)
        of_port = [
            sum(
                connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
                for connection in worker.net_connections("tcp")
            )
            for worker in before
        ]
        assert sum(of_port) == 24 and min(of_port) > 0

        # whichever is asked shows the sum
        assert [metric(server.address, asked) for _ in range(10)] == [24.0] * 10
        assert metric(server.address, 'items_total{model="reranker"}') > 48  # with the warm-up of both

        # one that dies is replaced, what it has counted stays, and the other one answers meanwhile
        before[0].kill()
        wait_until(lambda: "another one is started" in server.log)
        assert f"{before[0].pid} ended by SIGKILL" in server.log
        assert rerank(server.address).status_code == 200
        wait_until(lambda: len(workers_of(server)) == 2)
        assert before[1] in workers_of(server)
        assert metric(server.address, asked) == 25.0

        everything = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
        assert psutil.wait_procs(everything, 60)[1] == []
        for client in held:
            client.close()
    wait_until(lambda: "stopped" in server.log)
    assert "Traceback" not in server.log


def test_a_signal_to_all_processes_is_one_signal_and_what_is_inside_is_finished(model):
    """As a terminal or a service manager sends it: workers get it too, and are told by the parent besides."""
    many = {"query": "capital of France", "texts": [f"{number} Paris is a city" for number in range(900)]}
    options = ("--model", model, "--workers", "2", "--batch_tokens", "16", "--timeout", "600")
    with started(*options) as server, ThreadPoolExecutor(1) as pool:
        inside = pool.submit(httpx.post, f"{server.address}/rerank", json=many, timeout=600)
        wait_until(lambda: metric(server.address, "requests_inside") == 1 or inside.done())
        everything = psutil.Process(server.process.pid).children(recursive=True)
        for process in [*everything, server.process]:
            process.send_signal(signal.SIGINT)
        assert len(inside.result(600).json()) == 900
        assert server.process.wait(600) == 0
        assert psutil.wait_procs(everything, 60)[1] == []


def test_workers_end_when_their_parent_is_killed(model):
    with started("--model", model, "--workers", "2") as server:
        everything = psutil.Process(server.process.pid).children(recursive=True)
        assert len(everything) >= 2
        server.process.kill()
        assert psutil.wait_procs(everything, 60)[1] == []


def test_a_worker_that_cannot_serve_ends_the_server_with_its_error(tmp_path, capfd):
    assert main(["serve", "--model", str(tmp_path), "--port", "0", "--workers", "2"]) == 2
    printed = capfd.readouterr().err
    assert str(tmp_path) in printed and printed.count("error:") == 1 and "Traceback" not in printed
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_silent_connections_give_way_in_every_worker(model):
    """Each may open 256 files, so it holds 128 connections; 600 silent ones do not keep a request out."""
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    limited = ("-c", f"{program}; from rag_retrieval.cli import main; sys.exit(main(sys.argv[1:]))")
    with started("--model", model, "--workers", "2", program=limited) as server:
        port = int(server.address.rsplit(":")[-1])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(600)]
        assert rerank(server.address).status_code == 200
        assert "Traceback" not in server.log
        for connection in silent:
            connection.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
