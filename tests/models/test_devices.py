"""Names of devices and number formats; the accelerators themselves are not on every machine."""

import pytest
import torch

from rag_retrieval.models.devices import check_devices, choose_device, choose_dtype, choose_precision


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device: 'gpu' is no device of torch"),
        ("cuda:99", "device: cuda:99 is not on this machine"),
        ("npu:0", "device: npu needs the package torch_npu"),
        ("meta", "device: meta keeps no weights"),
        pytest.param("mps", "device: mps is not on this machine",
                     marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is here")),
    ],
)  # fmt: skip
def test_a_device_that_is_not_here_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        choose_device(name)
    with pytest.raises(ValueError, match=message.replace("device:", "devices:")):
        check_devices(["cpu", name])


def test_without_a_name_the_accelerator_is_taken_where_there_is_one(monkeypatch):
    for found, expected in ((None, "cpu"), ("cuda", "cuda"), ("mps", "mps"), ("xpu", "cpu")):
        device = None if found is None else torch.device(found)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, device=device: device)
        assert choose_device(None) == torch.device(expected)
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")


def test_formats_have_one_name_each_for_weights_and_for_computation():
    assert [choose_dtype(name) for name in ("fp32", "bf16", "fp16", None, torch.float16)] == [
        torch.float32, torch.bfloat16, torch.float16, None, torch.float16,
    ]  # fmt: skip
    assert [choose_precision(name) for name in ("fp32", "bf16", "fp16", None)] == [
        "no", "bf16", "fp16", None,
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_scores_of_the_cpu(model_folders):
    from rag_retrieval import Reranker

    pairs = [["where is Paris", "Paris is in France"], ["a", "water " * 100]]
    expected = Reranker(model_folders["bert"], device="cpu").compute_score(pairs)
    exact = Reranker(model_folders["bert"], device="cuda", precision="fp32").compute_score(pairs)
    assert exact == pytest.approx(expected, abs=1e-3)
    assert Reranker(model_folders["bert"]).compute_score(pairs) == pytest.approx(expected, abs=0.2)
