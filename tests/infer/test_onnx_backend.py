"""ONNX Runtime's backend: scores of the model it was exported from, without torch, from any number of threads."""

import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pair_samples import some_pairs

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported_samples import exported  # noqa: E402

from rag_retrieval import CrossEncoder, LLMDecoder, Reranker  # noqa: E402
from rag_retrieval.infer import onnx_backend  # noqa: E402
from rag_retrieval.infer.onnx_backend import OnnxBackend, default_threads  # noqa: E402
from rag_retrieval.models.calibration import Calibration, write_calibration  # noqa: E402

ROOT = Path(__file__).parents[2]
CLASSES = {"bert": CrossEncoder, "qwen2": LLMDecoder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[str, Path]]:
    """By family: the folder of a model saved by us, with a calibration, and its export."""
    import tiny_models

    root, made = tmp_path_factory.mktemp("onnx"), {}
    for family, make in (("bert", tiny_models.tiny_bert), ("qwen2", tiny_models.tiny_qwen2)):
        scorer = CLASSES[family].from_pretrained(make(root / f"{family}-tiny", head_labels=1), max_length=64)
        scorer.save_pretrained(root / f"{family}-model")
        write_calibration(root / f"{family}-model", Calibration(2.0, -0.5, "toy", 10))
        made[family] = str(root / f"{family}-model"), exported(root / f"{family}-model", root / f"{family}-onnx")
    return made


@pytest.fixture(scope="module")
def backend(folders) -> OnnxBackend:
    return OnnxBackend(folders["bert"][1], threads=1)


@pytest.mark.parametrize("family", CLASSES)
def test_a_reranker_gives_the_scores_of_torch_in_input_order(folders, family):
    model, folder = folders[family]
    pairs = some_pairs(60)
    expected = CLASSES[family].from_pretrained(model).compute_score(pairs).numpy()
    with Reranker(folder) as reranker:
        assert type(reranker.backend) is OnnxBackend and reranker.max_length == 64
        for batch_size in (256, 7, 1):
            assert np.abs(reranker.compute_score(pairs, batch_size=batch_size) - expected).max() < 1e-4
        assert np.ptp(expected) > 1, "else nothing could differ"
    with pytest.raises(ValueError, match="is closed"):
        reranker.compute_score(pairs)


def test_long_documents_ranks_and_probabilities_are_those_of_torch(folders):
    model, folder = folders["bert"]
    documents = [text for _, text in some_pairs(20)] + ["water " * 200]
    ours, other = (Reranker(path).rerank("water", documents, normalize=True) for path in (folder, model))
    assert [result.doc_id for result in ours] == [result.doc_id for result in other]
    assert [result.slice for result in ours] == [result.slice for result in other]
    assert [result.score for result in ours] == pytest.approx([result.score for result in other], abs=1e-4)


def test_the_calibration_travels_with_the_folder(folders):
    assert OnnxBackend(folders["qwen2"][1]).calibration == Calibration(2.0, -0.5, "toy", 10)


def test_special_tokens_in_texts_are_plain_text_where_the_model_says_so(folders, tmp_path):
    model = CrossEncoder.from_pretrained(folders["bert"][0], split_special_tokens=True)
    model.save_pretrained(tmp_path / "model")
    backend = OnnxBackend(exported(tmp_path / "model", tmp_path / "onnx"))
    pairs = [("what?", "a [SEP] b"), ("[CLS]", "water")]
    own = model.pair_encoder.encode(pairs)
    for found, expected, other in zip(
        backend.pair_encoder.encode(pairs), own, OnnxBackend(folders["bert"][1]).pair_encoder.encode(pairs), strict=True
    ):
        assert found.ids.tolist() == expected.ids.tolist() != other.ids.tolist()
    assert backend.fingerprint() != OnnxBackend(folders["bert"][1]).fingerprint()
    with pytest.raises(ValueError, match="split_special_tokens"):
        Reranker(tmp_path / "onnx", split_special_tokens=False)


def test_no_torch_and_no_transformers_are_imported(folders):
    script = f"""
import sys
from rag_retrieval import Reranker
reranker = Reranker({str(folders["bert"][1])!r})
results = reranker.rerank("water", ["Water boils.", "北京", "water " * 300], normalize=True)
print(len(results), [name for name in ("torch", "transformers", "onnx", "onnxscript") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[0] == "3 []", done.stdout + done.stderr


def test_threads_that_share_a_backend_get_the_scores_of_one(backend):
    batches = [backend.pair_encoder.encode(some_pairs(count)) for count in (5, 20, 33, 40)]
    expected = [backend.score(pairs, 8) for pairs in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(
            pool.map(lambda pairs: backend.score(pairs, 8), batches * 5), expected * 5, strict=True
        ):
            assert np.array_equal(found, wanted)


def test_no_pairs_give_no_scores(backend):
    assert backend.score([], 8).shape == (0,)


# --- threads and devices ---


def test_the_number_of_threads_is_given_or_of_the_environment_or_of_the_cores(monkeypatch, folders):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")  # for nested levels, as OpenMP reads it
    assert (default_threads(5), default_threads(None)) == (5, 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads(None) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="OMP_NUM_THREADS must be a whole number of at least 1, found 'many'"):
        default_threads(None)
    with pytest.raises(ValueError, match="^threads must be"):
        default_threads(0)
    session = OnnxBackend(folders["bert"][1], threads=2)._graph._session
    assert session.get_session_options().intra_op_num_threads == 2


def test_the_cpu_is_used_unless_a_gpu_is_asked_for(backend):
    assert backend._graph._session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "mps"])
def test_an_unknown_device_is_refused(folders, device):
    with pytest.raises(ValueError, match=f'an ONNX folder runs on "cpu", "cuda" or "cuda:1", found .{device}'):
        Reranker(folders["bert"][1], device=device)


def test_a_gpu_that_onnxruntime_cannot_use_is_an_error_and_no_silent_cpu(folders, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="device cuda:0: this onnxruntime has no CUDA; install onnxruntime-gpu"):
        Reranker(folders["bert"][1], device="cuda:0")


def test_the_cuda_provider_gets_the_number_of_the_device():
    class Runtime:
        get_available_providers = staticmethod(lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    assert onnx_backend.provider(Runtime, "cuda:1") == ("CUDAExecutionProvider", {"device_id": 1})
    assert onnx_backend.provider(Runtime, "cpu") == "CPUExecutionProvider"


# --- bad input ---


def test_options_that_an_exported_folder_cannot_take_are_refused(folders):
    folder = folders["qwen2"][1]
    for name, value in (("precision", "bf16"), ("dtype", "fp16"), ("devices", ["cpu"]), ("query_format", "q: {}")):
        with pytest.raises(ValueError, match=f"^{name}: .*ONNX folder"):
            Reranker(folder, **{name: value})
    with pytest.raises(ValueError, match="exported from a llm_decoder.*found 'bert_encoder'"):
        Reranker(folder, model_type="bert_encoder")
    assert Reranker(folder, model_type="onnx", max_length=32, device="cpu", precision="fp32").max_length == 32
    with pytest.raises(ValueError, match="max_length 65 is more than the 64 tokens"):
        Reranker(folder, max_length=65)


def test_a_damaged_graph_is_reported(folders, tmp_path):
    for file in folders["bert"][1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"model\.onnx: ONNX Runtime cannot open it .*export the model again"):
        Reranker(tmp_path)
    values = json.loads((tmp_path / "reranker_onnx.json").read_text())
    (tmp_path / "reranker_onnx.json").write_text(json.dumps(values | {"precision": "half"}))
    with pytest.raises(ValueError, match=r"reranker_onnx\.json: damaged"):
        Reranker(tmp_path)


def test_a_missing_onnxruntime_is_reported_with_the_extra(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime; run: pip install -e '\.\[onnx\]'"):
        Reranker(folders["bert"][1])


def test_a_copy_and_a_pickle_open_the_folder_again(backend):
    pairs = backend.pair_encoder.encode(some_pairs(5))
    for other in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert np.array_equal(other.score(pairs, 256), backend.score(pairs, 256))
