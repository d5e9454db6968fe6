"""The page from a notebook to a service, run from top to bottom in one folder: commands in a shell, Python blocks in
one session as in a notebook, and the server beside them.

What the page prints is compared but for its numbers, which depend on the machine.
"""

import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from page_blocks import blocks, missing_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "service.md"
START = 300  # seconds until the server has opened its models


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(server: subprocess.Popen, port: int) -> None:
    for _ in range(START * 5):
        assert server.poll() is None, "the server ended"
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except (URLError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no answer within {START} s")


def test_the_page_runs_from_top_to_bottom_and_prints_what_it_shows(tmp_path, monkeypatch):
    for library in ("langchain_core", "onnxruntime", "openai", "uvicorn"):
        pytest.importorskip(library)
    (tmp_path / "example_data").symlink_to(ROOT / "example_data")
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    port, session, server, printed = free_port(), {}, None, ""
    try:
        for language, content in blocks(PAGE.read_text(encoding="utf-8").replace("8080", str(port))):
            if language == "python":
                with redirect_stdout(io.StringIO()) as output:
                    exec(content, session)
                printed = output.getvalue()
            elif content.startswith("rag-retrieval serve"):
                server = subprocess.Popen(["bash", "-c", f"exec {content}"], env=environment)
                wait_for(server, port)
            elif language == "bash":
                done = subprocess.run(["bash", "-ec", content], env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{content}\n{done.stdout}{done.stderr}"
                printed = done.stdout + done.stderr
            elif language == "json":
                assert json.loads(printed).keys() == json.loads(content).keys()
            else:
                missing = missing_lines(content, printed)
                assert not missing, f"{missing} is not in:\n{printed}"
    finally:
        if server is not None:
            server.terminate()
    assert server.wait(timeout=60) == 0
