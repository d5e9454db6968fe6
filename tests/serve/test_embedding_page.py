"""The commands and programs of the page about embeddings, and that its tables have every key."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from serve_embedding_samples import running_embedder
from serve_samples import listening

from rag_retrieval.core.config_reader import load_config
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding_cohere import TYPES, CohereRequest
from rag_retrieval.serve.embedding_openai import OpenAIRequest
from rag_retrieval.serve.embedding_tei import (
    CommonKeys,
    EmbedRequest,
    SimilarityInputs,
    SimilarityRequest,
    TokenizeRequest,
)
from rag_retrieval.serve.server import EMBEDDING_ENDPOINTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve_embeddings.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def address(embedders):
    with running_embedder(embedders["unified"]) as service, listening(service) as own:
        yield own


def test_every_request_of_the_page_is_answered(address):
    commands = [
        command for command in re.split(r"\n(?=[a-z])", "\n".join(blocks("bash"))) if command.startswith("curl")
    ]
    answers = []
    for command in commands:
        arguments = shlex.split(command.replace(ADDRESS, address))
        done = subprocess.run([*arguments, "--silent", "--fail-with-body"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        answers.append(json.loads(done.stdout))
    embed, sparse, every, similarity, tokens, info = answers
    assert len(embed[0]) == 32 and sparse[0][0].keys() == {"index", "value"} and len(every[0][0]) == 32
    assert len(similarity) == 2 and tokens[0][0]["special"] is True and info["dimensions"] == 32


def test_the_programs_of_the_page_run(address):
    names = {}
    for block in blocks("python"):
        exec(block.replace(ADDRESS, address), names)
    assert [len(entry.embedding) for entry in names["answer"].data] == [16, 16]
    assert len(names["stored"].embeddings.int8[0]) == 32 and len(names["asked"].embeddings.float_[0]) == 32


def test_the_start_of_the_page_has_options_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "e" / "model").mkdir(parents=True)
    (start,) = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("rag-retrieval")]
    load_config(ServeConfig, None, shlex.split(start)[2:])


def test_every_key_type_and_path_stands_on_the_page():
    table = PAGE[PAGE.index("## Keys") : PAGE.index("## Errors")]
    for schema in (
        OpenAIRequest,
        CohereRequest,
        CommonKeys,
        EmbedRequest,
        SimilarityRequest,
        SimilarityInputs,
        TokenizeRequest,
    ):
        assert all(f"`{key}`" in table for key in schema.model_fields), schema
    assert all(f"`{name}`" in PAGE for name in TYPES)
    texts = PAGE + "".join(blocks("python"))
    paths = [path for kind in EMBEDDING_ENDPOINTS for path in kind.paths]
    assert all(path in texts for path in paths if path not in ("/v1/embeddings", "/v2/embed"))  # which clients add
