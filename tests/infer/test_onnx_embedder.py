"""The Embedder on an exported folder: the vectors of torch without torch, and which options such a folder takes."""

import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from embedder_samples import PROMPTS, TEXTS  # noqa: E402
from exported_samples import exported  # noqa: E402
from tiny_models import HIDDEN, tiny_bert  # noqa: E402

from rag_retrieval import Embedder, IndexOptions, Reranker, build_index  # noqa: E402
from rag_retrieval.infer.onnx_backend import OnnxEmbedder  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402
from rag_retrieval.models.options import EmbedderOptions  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model that leaves its prompts out of the mean, with int8 ranges, and its export."""
    root = tmp_path_factory.mktemp("embedder")
    options = {"prompts": PROMPTS, "include_prompt": False, "max_length": 40, "query_max_length": 24}
    EmbeddingModel.from_pretrained(tiny_bert(root / "base"), **options).save_pretrained(root / "model")
    Embedder(root / "model", device="cpu").calibrate(TEXTS[:9], root / "model")
    return root / "model", exported(root / "model", root / "onnx")


@pytest.fixture(scope="module")
def of_torch(folders) -> Embedder:
    return Embedder(folders[0], device="cpu")


@pytest.fixture(scope="module")
def embedder(folders) -> Embedder:
    return Embedder(folders[1])


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_vectors_are_those_of_torch(embedder, of_torch):
    assert type(embedder.backend) is OnnxEmbedder and embedder.dim == HIDDEN and embedder.settings == of_torch.settings
    for name in ("encode", "encode_queries", "encode_documents"):
        expected = getattr(of_torch, name)(TEXTS)
        for batch_size in (256, 3):
            assert_equal(getattr(embedder, name)(TEXTS, batch_size=batch_size), expected)
    queries, documents = embedder.encode_queries(TEXTS), embedder.encode_documents(TEXTS)
    assert np.abs(queries - documents).max() > 0.1, "else prompts would do nothing"
    assert_equal(embedder.similarity(queries, documents), of_torch.similarity(queries, documents))


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 8},
        {"normalize": False},
        {"dim": 8, "normalize": False},
        {"max_length": 9},
        {"prompt": "ask: ", "kind": "query"},
        {"prompt": ""},
        {"precision": "float16"},
    ],
    ids=str,
)
def test_options_of_encode_do_what_they_do_with_torch(embedder, of_torch, options):
    found, expected = (each.encode(TEXTS, **options) for each in (embedder, of_torch))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-3 if found.dtype == np.float16 else 1e-5)


def test_int8_ranges_travel_with_the_folder(embedder, of_torch):
    found, expected = (each.encode(TEXTS, precision="int8").astype(int) for each in (embedder, of_torch))
    assert np.abs(found - expected).max() <= 1 and np.ptp(found) > 200


def test_one_text_no_text_and_empty_texts(embedder, of_torch):
    assert_equal(embedder.encode("water"), of_torch.encode("water"))
    assert_equal(embedder.encode_queries(""), of_torch.encode_queries(""))
    assert embedder.encode([]).shape == (0, HIDDEN)


def test_an_exported_folder_gives_dense_vectors_alone(embedder):
    np.testing.assert_array_equal(embedder.encode(TEXTS, outputs=["dense"]).dense, embedder.encode(TEXTS))
    with pytest.raises(ValueError, match="outputs: .* gives dense, and 'lexical' was asked for"):
        embedder.encode(TEXTS, outputs=["dense", "lexical"])


def test_equal_texts_are_computed_once_and_have_equal_bits(folders):
    embedder = Embedder(folders[1])
    forwards, computed = embedder.backend.forwards, []
    embedder.backend.forwards = lambda texts, *more: computed.append(len(texts)) or forwards(texts, *more)
    found = embedder.encode([TEXTS[place % 7] for place in range(40)], batch_size=2)
    assert computed == [7]
    for place in range(40):
        np.testing.assert_array_equal(found[place], found[place % 7])


def test_neither_torch_nor_transformers_is_imported(folders):
    script = f"""
import sys
from rag_retrieval import Embedder
embedder = Embedder({str(folders[1])!r})
vectors = embedder.encode_queries(["Water boils.", "北京", "water " * 300], dim=16, precision="binary")
similarity = embedder.similarity(vectors, embedder.encode_documents(["水"], dim=16))
print(vectors.shape, similarity.shape, [name for name in ("torch", "transformers", "onnx") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "(3, 2) (3, 1) []", done.stdout + done.stderr


def test_threads_get_the_vectors_of_one(embedder):
    requests = [TEXTS[place % 5 :: 2] for place in range(12)]
    alone = [embedder.encode_queries(texts) for texts in requests]
    with ThreadPoolExecutor(4) as threads:
        for found, expected in zip(threads.map(embedder.encode_queries, requests), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_copy_and_a_pickle_open_the_folder_again(folders):
    embedder = Embedder(folders[1], prompts={"query": "ask: "}, max_length=30)
    for other in (copy.deepcopy(embedder), pickle.loads(pickle.dumps(embedder))):
        np.testing.assert_array_equal(other.encode_queries(TEXTS), embedder.encode_queries(TEXTS))


def test_a_closed_embedder_lets_its_graph_go(folders):
    with Embedder(folders[1]) as embedder:
        graph = weakref.ref(embedder.backend._graph)
        embedder.encode("water")
    gc.collect()
    assert graph() is None
    with pytest.raises(ValueError, match="onnx is closed; open it again"):
        embedder.encode("water")


def test_options_of_opening_that_leave_the_graph_as_it_is(folders):
    given = {"prompts": {"query": "ask: ", "document": ""}, "normalize": False, "max_length": 30, "query_max_length": 7}
    other, of_torch = Embedder(folders[1], device="cpu", precision="fp32", **given), Embedder(folders[0], **given)
    for name in ("encode", "encode_queries", "encode_documents"):
        assert_equal(getattr(other, name)(TEXTS), getattr(of_torch, name)(TEXTS))
    assert other.settings == of_torch.settings


def test_every_other_option_of_opening_is_refused_by_name(folders):
    refused = {
        "pooling": "cls", "include_prompt": True, "cls_interval": 8, "bidirectional": True, "devices": ["cpu"],
        "dtype": "bf16", "precision": "fp16", "trust_remote_code": True, "attn_implementation": "eager",
    }  # fmt: skip
    taken = {"model_type", "max_length", "query_max_length", "prompts", "normalize", "device"}
    assert {*refused} | taken == {*EmbedderOptions.model_fields}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: .*onnx is an ONNX folder"):
            Embedder(folders[1], **{name: value})
    with pytest.raises(ValueError, match='device: an ONNX folder runs on "cpu", "cuda" or "cuda:1", found .mps'):
        Embedder(folders[1], device="mps")
    for name in ("max_length", "query_max_length"):
        with pytest.raises(ValueError, match=f"{name} 41 is more than the 40 tokens"):
            Embedder(folders[1], **{name: 41})
    with pytest.raises(ValueError, match="max_length 41 is more than the 40 tokens"):
        Embedder(folders[1]).encode(TEXTS, max_length=41)


def test_what_a_folder_is_not_is_said(folders, model_folders, tmp_path):
    with pytest.raises(ValueError, match="it gives dense, and an embedder ranks by token vectors"):
        Reranker(folders[1])
    with pytest.raises(ValueError, match="is an ONNX folder, which holds no model of torch"):
        _ = Embedder(folders[1]).model
    with pytest.raises(ValueError, match="is a reranker"):
        Embedder(exported(model_folders["bert"], tmp_path / "reranker"))


def test_a_damaged_description_is_reported(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "copy")
    file = tmp_path / "copy" / "embedder_onnx.json"
    values = json.loads(file.read_text())
    for change in ({"dim": 0}, {"template": {}}, {"inputs": ["input_ids"]}, {"format": 2}, {"settings": {}}):
        file.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=r"embedder_onnx\.json: damaged .*export the model again"):
            Embedder(tmp_path / "copy")


def test_an_index_is_built_and_searched_with_an_exported_folder(folders, tmp_path):
    lines = [json.dumps({"id": str(place), "text": text}) for place, text in enumerate(TEXTS) if text]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = []
    for name, folder in zip(("torch", "onnx"), folders, strict=True):
        index = build_index(tmp_path / "corpus.jsonl", tmp_path / name, IndexOptions(embedder=str(folder), bm25=False))
        found.append(index.searches["dense"].search(TEXTS[:3], [np.array([], int)] * 3, 5))
    for of_torch, of_onnx in zip(*found, strict=True):
        np.testing.assert_array_equal(of_onnx.rows, of_torch.rows)
        np.testing.assert_allclose(of_onnx.scores, of_torch.scores, atol=1e-5)
