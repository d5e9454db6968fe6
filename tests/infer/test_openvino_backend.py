"""OpenVINO's backend on the same folders: the scores of torch, in input order, from several threads.

A process that has computed with OpenVINO (2026.4) dies of a segmentation fault when it forks later, as other tests do
for their data loaders. So these run in a process of their own, when RAG_RETRIEVAL_TEST_OPENVINO says so.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pair_samples import some_pairs

if not os.environ.get("RAG_RETRIEVAL_TEST_OPENVINO"):
    pytest.skip("RAG_RETRIEVAL_TEST_OPENVINO=1 runs them, in a process of their own", allow_module_level=True)
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

from embedder_samples import FAMILIES, PROMPTS, TEXTS  # noqa: E402
from exported_samples import exported  # noqa: E402

from rag_retrieval import Embedder, Reranker  # noqa: E402
from rag_retrieval.infer.onnx_backend import OnnxBackend, OpenVino  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402
from rag_retrieval.models.llm_decoder import DEFAULT_FORMATS  # noqa: E402


@pytest.fixture(scope="module")
def folder_of(load_tiny, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("openvino"), {}

    def folder(family: str, **options):
        key = (family, *options)
        if key not in made:
            model = root / ("-".join(key) + "-model")
            load_tiny(family).save_pretrained(model)  # a decoder's folder then says how it is asked
            made[key] = exported(model, root / "-".join(key), **options)
        return made[key]

    return folder


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "qwen2"])
def test_scores_are_those_of_torch_in_input_order(load_tiny, folder_of, family):
    pairs = some_pairs(40)
    expected = load_tiny(family).compute_score(pairs).numpy()
    formats = DEFAULT_FORMATS if family == "qwen2" else {}
    reranker = Reranker(folder_of(family, **formats), model_type="openvino")
    assert reranker.backend.runtime is OpenVino
    for batch_size in (256, 7):
        assert np.abs(reranker.compute_score(pairs, batch_size=batch_size) - expected).max() < 1e-4


@pytest.mark.parametrize(("family", "options"), [("bert", {"include_prompt": False}), ("qwen2", {})])
def test_vectors_of_an_embedder_are_those_of_torch(tmp_path, family, options):
    model = EmbeddingModel.from_pretrained(FAMILIES[family](tmp_path / "base"), prompts=PROMPTS, **options)
    model.save_pretrained(tmp_path / "model")
    of_torch = Embedder(tmp_path / "model", device="cpu")
    embedder = Embedder(exported(tmp_path / "model", tmp_path / "onnx"), model_type="openvino")
    assert embedder.backend.runtime is OpenVino
    for batch_size in (256, 7):
        for name in ("encode_queries", "encode_documents"):
            found = getattr(embedder, name)(TEXTS, batch_size=batch_size)
            np.testing.assert_allclose(found, getattr(of_torch, name)(TEXTS), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("xlm_roberta", {"representations": ("dense", "lexical", "multi_vector"), "pooling": "cls"}),
        ("bert", {"representations": ["lexical"], "lexical": "splade"}),
        ("bert", {"representations": ["multi_vector"], "query_max_length": 20}),
    ],
)
def test_every_representation_is_that_of_torch(tmp_path, family, options):
    model = EmbeddingModel.from_pretrained(FAMILIES[family](tmp_path / "base"), max_length=64, **options)
    model.save_pretrained(tmp_path / "model")
    of_torch = Embedder(tmp_path / "model", device="cpu")
    embedder = Embedder(exported(tmp_path / "model", tmp_path / "onnx"), model_type="openvino")
    pairs = [(TEXTS[place], TEXTS[-place]) for place in range(1, 8)]
    found, expected = (each.compute_score(pairs, batch_size=5) for each in (embedder, of_torch))
    for name in options["representations"]:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    if "multi_vector" in options["representations"]:
        reranker = Reranker(tmp_path / "onnx", model_type="openvino")
        np.testing.assert_allclose(reranker.compute_score(pairs), expected.multi_vector, rtol=1e-4, atol=1e-4)


def test_an_int8_folder_ranks_like_the_float32_one(folder_of):
    pairs = some_pairs(40)
    exact = OnnxBackend(folder_of("bert"), runtime=OpenVino)
    encoded = exact.pair_encoder.encode(pairs)
    small = OnnxBackend(folder_of("bert", quantize="int8", force=True), runtime=OpenVino)
    assert np.corrcoef(exact.score(encoded, 256), small.score(encoded, 256))[0, 1] > 0.95


def test_threads_that_share_a_backend_get_the_scores_of_one(folder_of):
    backend = OnnxBackend(folder_of("bert"), threads=1, runtime=OpenVino)
    batches = [backend.pair_encoder.encode(some_pairs(count)) for count in (5, 20, 33, 40)]
    expected = [backend.score(pairs, 8) for pairs in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(
            pool.map(lambda pairs: backend.score(pairs, 8), batches * 3), expected * 3, strict=True
        ):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_missing_openvino_is_reported_with_the_extra_and_a_gpu_refused(folder_of, monkeypatch):
    with pytest.raises(ValueError, match='device: OpenVINO runs on "cpu" here, found .cuda'):
        Reranker(folder_of("bert"), model_type="openvino", device="cuda")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"run: pip install -e '\.\[openvino\]'"):
        Reranker(folder_of("bert"), model_type="openvino")
