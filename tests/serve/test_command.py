"""The command as a process of its own: options, start, signals."""

import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from serve_samples import started, wait_until
from tiny_models import tiny_bert

from rag_retrieval.cli import main
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.serve.server import bound_socket

# scoring waits as long as the file in its first argument exists
HELD = """
import sys, time
from pathlib import Path
from rag_retrieval.cli import main
from rag_retrieval.serve.reranking import RerankModel
score = RerankModel.score
def held_score(self, pairs):
    while Path(sys.argv[1]).exists():
        time.sleep(0.01)
    return score(self, pairs)
RerankModel.score = held_score
sys.exit(main(sys.argv[2:]))
"""


def test_help_lists_every_key(capsys):
    assert main(["serve", "--help"]) == 0
    printed = capsys.readouterr().out
    for key in ("--model ", "--host ", "max_documents", "queue_pairs", "timeout"):
        assert key in printed


def test_wrong_options_are_one_error_and_exit_code_2(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path), "--port", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --port: ") and "65,535" in line and "x" in line


def test_a_port_in_use_is_an_error_before_the_model_is_read(tmp_path, capsys):
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        assert main(["serve", "--model", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_an_empty_token_is_an_error_and_does_not_open_the_server(tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    assert main(["serve", "--model", str(tmp_path), "--port", "0", "--token_file", str(tmp_path / "token")]) == 2
    assert "expected one token" in capsys.readouterr().err


def test_a_folder_without_a_model_is_an_error_and_no_server(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_missing_library_is_reported_with_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "rag_retrieval.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    printed = capsys.readouterr().err
    assert "uvicorn" in printed and printed.endswith("run: pip install -e '.[serve]'\n")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_server_finish_what_it_took_and_end_with_0(tmp_path, sent):
    many = {"query": "capital of France", "texts": [f"{number} Paris" for number in range(100)]}
    small = {"query": "capital of France", "texts": ["Paris"]}
    options = ("--model", tiny_bert(tmp_path / "model", head_labels=1), "--batch_tokens", "200", "--timeout", "600")
    hold = tmp_path / "hold"
    with started(*options, program=("-c", HELD, str(hold))) as server:
        hold.touch()
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.address, timeout=600) as client:
            inside = pool.submit(httpx.post, f"{server.address}/rerank", json=many, timeout=600)
            wait_until(lambda: "rag_retrieval_requests_inside 1.0" in client.get("/metrics").text)
            server.process.send_signal(sent)
            wait_until(lambda: client.get("/health").status_code == 503)
            assert client.post("/rerank", json=small).status_code == 503
            assert not inside.done()
            hold.unlink()
            assert len(inside.result(600).json()) == 100
        assert server.process.wait(600) == 0
    wait_until(lambda: "stopped" in server.log)
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_the_token_comes_from_the_environment_and_an_open_host_without_one_is_warned_of(tmp_path):
    model = tiny_bert(tmp_path / "model", head_labels=1)
    body = {"query": "q", "documents": ["a"]}
    with started("--model", model, "--name", "ours", RAG_RETRIEVAL_SERVE_TOKEN="secret") as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert httpx.post(f"{server.address}/rerank", json=body, timeout=60).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{server.address}/rerank", json=body, headers=headers, timeout=60).json()["model"] == "ours"
        assert "secret" not in server.log and "no token" not in server.log
    with started("--model", model, "--host", "0.0.0.0") as server:
        assert "other machines see 0.0.0.0, and no token is asked for" in server.log


@pytest.mark.slow
def test_exported_folders_are_served_without_torch(base_folders, tmp_path):
    pytest.importorskip("onnxruntime")
    from exported_samples import exported  # needs onnx

    reranker = exported(tiny_bert(tmp_path / "model", head_labels=1), tmp_path / "reranker")
    EmbeddingModel.from_pretrained(base_folders["bert"], max_length=64).save_pretrained(tmp_path / "embedding")
    embedder = exported(tmp_path / "embedding", tmp_path / "embedder")
    # whatever would import them fails
    program = "import sys; sys.modules |= {'torch': None, 'transformers': None}"
    program += "; from rag_retrieval.cli import main; sys.exit(main(sys.argv[1:]))"
    with started("--model", str(reranker), "--embedder", str(embedder), program=("-c", program)) as server:
        with httpx.Client(base_url=server.address, timeout=120) as client:
            ranked = client.post("/rerank", json={"query": "capital", "texts": ["Paris", "Seine"]}).json()
            vectors = client.post("/v1/embeddings", json={"input": ["Paris", "巴黎"]}).json()["data"]
            info, metrics = client.get("/info").json(), client.get("/metrics").text
        assert sorted(entry["index"] for entry in ranked) == [0, 1]
        expected = Embedder(embedder).encode(["Paris", "巴黎"])
        assert np.allclose([entry["embedding"] for entry in vectors], expected, atol=1e-5)
        assert info["models"].keys() == {"reranker", "embedder"}
        assert info["model_type"] == info["models"]["embedder"]["model_type"] == {"embedding": {"pooling": "mean"}}
        assert info["models"]["reranker"]["model_type"].keys() == {"reranker"} and info["max_input_length"] == 64
        assert 'rag_retrieval_requests_total{path="/v1/embeddings",status="200"} 1.0' in metrics
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
    assert "reranker reranker is loaded" in server.log and "embedder embedder is loaded" in server.log
