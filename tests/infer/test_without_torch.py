"""An exported folder with dense vectors, lexical weights and token vectors answers as its model, and without torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import exported_answers  # noqa: E402
import torch  # noqa: E402
from embedder_samples import PROMPTS, TEXTS  # noqa: E402
from exported_answers import ALL, answers  # noqa: E402
from exported_samples import exported  # noqa: E402
from tiny_models import tiny_xlm_roberta  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from rag_retrieval import Embedder, Index, IndexOptions, Reranker, Retriever, build_index  # noqa: E402
from rag_retrieval.infer.onnx_backend import open_session  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "onnx.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model in the layout of bge-m3, and its export."""
    root = tmp_path_factory.mktemp("m3")
    options = {"representations": ALL, "pooling": "cls", "colbert_dim": 24, "max_length": 64, "prompts": PROMPTS}
    torch.manual_seed(0)  # of the heads
    model = EmbeddingModel.from_pretrained(tiny_xlm_roberta(root / "base"), **options)
    model.token_heads["lexical"].bias.data += 1  # else most weights would be 0
    model.save_pretrained(root / "model")
    return root / "model", exported(root / "model", root / "onnx")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"id": str(place), "text": text}) for place, text in enumerate(TEXTS) if text]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def of_torch(folders, corpus, tmp_path_factory) -> tuple[dict, Path]:
    """What the model answers, and the folder with its index."""
    work = tmp_path_factory.mktemp("torch")
    return answers(str(folders[0]), corpus, work), work


def assert_near(found, expected, place: str = "") -> None:
    """Of JSON values: the same, with numbers within 1e-4."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            assert_near(found[name], value, f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_near(found[number], value, f"{place}[{number}]")
    else:
        assert found == (pytest.approx(expected, abs=1e-4, rel=1e-4) if isinstance(expected, float) else expected), (
            place
        )


@pytest.mark.slow
def test_every_answer_is_that_of_the_model(folders, corpus, of_torch, tmp_path):
    assert_near(json.loads(json.dumps(answers(str(folders[1]), corpus, tmp_path))), json.loads(json.dumps(of_torch[0])))


@pytest.mark.slow
def test_nothing_of_it_imports_torch(folders, corpus, of_torch, tmp_path):
    command = [sys.executable, exported_answers.__file__, str(folders[1]), corpus, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_near(json.loads(done.stdout.splitlines()[-1]), json.loads(json.dumps(of_torch[0])))


SERVER = """
import sys
from exported_answers import Refuse
sys.meta_path.insert(0, Refuse())
from rag_retrieval.cli import main
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""


@contextmanager
def server(*options: str) -> Iterator[str]:
    """The address of a server whose process refuses torch."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command, lines = [sys.executable, "-c", SERVER, *options], []
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                yield found[1]
                return
        raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_server_answers_without_torch(folders, corpus, tmp_path):
    build_index(corpus, tmp_path / "index", IndexOptions(embedder=str(folders[1]), representations=ALL))
    queries, documents = ([pair[side] for pair in exported_answers.PAIRS] for side in (0, 1))
    folder = str(folders[1])
    with Embedder(folder) as embedder, Reranker(folder) as reranker:
        expected = embedder.encode_queries(queries, outputs=ALL)
        ranked = [result.score for result in reranker.rerank(queries[0], documents[:2])]
        retriever = Retriever(tmp_path / "index", embedder=embedder, reranker=reranker, normalize=True)
        searched = {result.doc_id: result.score for result in retriever.search(queries[0], top_k=5)}
    with server("--model", folder, "--embedder", folder, "--index", str(tmp_path / "index")) as address:

        def post(path: str, **body):
            answer = httpx.post(f"{address}/{path}", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            return answer.json()

        inputs = {"inputs": queries[:3], "prompt_name": "query"}
        np.testing.assert_allclose(post("embed", **inputs), expected.dense[:3], atol=1e-5)
        for found, vectors in zip(post("embed_all", **inputs), expected.multi_vector[:3], strict=True):
            np.testing.assert_allclose(found, vectors, atol=1e-5)
        for place, found in enumerate(post("embed_sparse", **inputs)):
            weights = {entry["index"]: entry["value"] for entry in found}
            assert weights == pytest.approx(expected.lexical.by_id(place), abs=1e-5)
        results = post("rerank", query=queries[0], documents=documents[:2], raw_scores=True)["results"]
        assert [result["relevance_score"] for result in results] == pytest.approx(ranked, abs=1e-5)
        results = post("search", query=queries[0], top_k=5)["results"]
        assert {result["id"]: result["score"] for result in results} == pytest.approx(searched, abs=1e-4)


def test_an_index_of_the_model_is_searched_with_the_export_that_is_given(folders, of_torch):
    """By its name it is another model: its vectors differ in the last bits, in int8 by much more."""
    index = Index(of_torch[1] / "index")
    index.options = index.options.model_copy(update={"embedder": str(folders[1])})
    with pytest.raises(ValueError, match="model: was"):
        _ = index.embedder
    none = [np.zeros(0, np.int64)]
    by_torch = Index(of_torch[1] / "index", device="cpu")
    with Embedder(folders[1]) as embedder:
        by_export = Index(of_torch[1] / "index", embedder=embedder)
        for stage in ALL:
            (found,), (expected,) = (
                index.searches[stage].search(["water and oxygen"], none, 5) for index in (by_export, by_torch)
            )
            np.testing.assert_array_equal(found.rows, expected.rows)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


def test_the_block_of_the_page_runs(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders[1], "runs/m3/onnx")
    section = PAGE.read_text(encoding="utf-8").partition("\n## Lexical weights and token vectors\n")[2]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = {}
    exec(block, names)
    assert names["found"].multi_vector[0].shape[1] == 24 and names["scores"].lexical.shape == (2,)
    assert len(names["ranked"]) == 2 and "meets" in capsys.readouterr().out


def test_other_programs_get_the_representations_by_what_the_page_says(folders, of_torch):
    description = json.loads((folders[1] / "embedder_onnx.json").read_text())
    session = open_session(folders[1] / "model.onnx", "cpu", 1)
    assert [tuple(output.shape) for output in session.get_outputs()] == [
        ("texts", 32), ("texts", "length"), ("texts", "length", 24), ("texts", 32)
    ]  # fmt: skip
    tokenizer = Tokenizer.from_file(str(folders[1] / "tokenizer.json"))
    texts = [tokenizer.encode(PROMPTS["query"] + query).ids for query, _ in exported_answers.PAIRS]
    length = max(map(len, texts))
    ids = np.array([own + [0] * (length - len(own)) for own in texts])
    mask = np.array([[1] * len(own) + [0] * (length - len(own)) for own in texts])
    names = ["token_weights", "token_vectors", "sentence_embedding"]
    weights, vectors, dense = session.run(names, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(dense, of_torch[0]["dense"], atol=1e-5)
    for place, own in enumerate(texts):
        largest = {}
        for token, weight in zip(own, weights[place].tolist(), strict=False):
            if token not in description["special"] and weight > 0:
                largest[token] = max(weight, largest.get(token, 0))
        expected = sorted(of_torch[0]["lexical"][place].values())
        assert sorted(largest.values()) == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(vectors[place, 1 : len(own)], of_torch[0]["multi_vector"][place], atol=1e-5)


def test_options_of_a_reranker_by_token_vectors(folders):
    reranker = Reranker(folders[1], max_length=20)
    assert reranker.max_length == 20 and reranker.backend.describe().endswith("in ONNX Runtime, float32")
    pair = ["water", "Water boils at 100 degrees Celsius at sea level, and lower on high mountains. " * 3]
    expected = Reranker(folders[0], max_length=20, device="cpu").compute_score(pair)
    assert reranker.compute_score(pair) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="dtype: .*onnx is an ONNX folder"):
        Reranker(folders[1], dtype="bf16")
