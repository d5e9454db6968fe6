"""The commands of the server's page: requests are answered, options exist, keys and numbers are those of the code."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from serve_samples import listening, running_service

from rag_retrieval.core.config_reader import load_config
from rag_retrieval.serve import app, server
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.endpoints import PIECE_CHARACTERS
from rag_retrieval.serve.http import ERROR_TYPES
from rag_retrieval.serve.reranking import RerankEndpoint
from rag_retrieval.serve.schemas import RerankRequest

WHOLE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
PAGE = re.sub(r"\n## Search\n.*?(?=\n## )", "", WHOLE, flags=re.DOTALL)  # test_searching has the other part
ADDRESS = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands(name: str) -> list[str]:
    """Of the shell blocks, each whole: a quoted body goes over several lines."""
    joined = re.split(r"\n(?=[a-z])", "\n".join(blocks("bash")))
    return [command for command in joined if command.startswith(name)]


def test_every_request_of_the_page_is_answered_as_it_says(backend):
    answers = []
    with running_service(backend) as service, listening(service) as address:
        for command in commands("curl"):
            arguments = shlex.split(command.replace(ADDRESS, address))
            done = subprocess.run([*arguments, "--silent", "--fail-with-body"], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            answers.append(done.stdout)
    assert len(answers) == 5
    shown, given = [json.loads(block) for block in blocks("json")], [json.loads(answer) for answer in answers[:2]]
    assert given[0].keys() == shown[0].keys() and given[0]["results"][0].keys() == shown[0]["results"][0].keys()
    assert [entry.keys() for entry in given[1]] == [entry.keys() for entry in shown[1]]


def test_the_client_libraries_of_the_page_are_answered(backend):
    pytest.importorskip("cohere")
    names = {}
    with running_service(backend) as service, listening(service) as address:
        for block in blocks("python"):
            exec(block.replace(ADDRESS, address), names)
    assert len(names["answer"].results) == 1


def test_every_start_of_the_page_has_options_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "model").mkdir(parents=True)
    subprocess.run(commands("openssl")[0], shell=True, check=True)
    for command in commands("rag-retrieval serve"):
        load_config(ServeConfig, None, shlex.split(command)[2:])
    assert len(commands("rag-retrieval serve")) == 3
    options = set(re.findall(r"`--([a-z_]+)", PAGE)) - {"help_all", "config", "auto"}
    assert options and options <= ServeConfig.model_fields.keys()


def test_keys_statuses_and_numbers_are_those_of_the_code():
    table = PAGE[PAGE.index("## Keys") : PAGE.index("## Errors")]
    assert all(f"`{key}`" in table for key in RerankRequest.model_fields)
    assert all(path in PAGE for path in (*RerankEndpoint.paths, *app.OTHER_PATHS))
    assert all(re.search(rf"\b{status}\b", PAGE) for status in ERROR_TYPES)
    assert f"{PIECE_CHARACTERS:,} characters" in PAGE and f"{server.MOST_CONNECTIONS:,}" in PAGE
    for words in (f"less {server.OTHER_FILES}", f"within {server.HEADER_SECONDS} s", f"kept for {server.KEEP_ALIVE} s"):
        assert words in PAGE
