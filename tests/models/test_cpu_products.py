import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_bert

from rag_retrieval import Embedder
from rag_retrieval.models import cpu_products
from rag_retrieval.models.cpu_products import OneDnnProducts, fast_products, onednn_is_faster, suits

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


@pytest.fixture
def used(monkeypatch):
    """Shapes that oneDNN multiplied."""
    shapes, product = [], cpu_products.product

    def noted(inputs, weight, bias=None):
        shapes.append(tuple(inputs.shape))
        return product(inputs, weight, bias)

    monkeypatch.setattr(cpu_products, "product", noted)
    return shapes


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)


def tensors(*shape: int, bias: bool = True) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    shapes = [(*shape, 24), (40, 24), (40,)][: 3 if bias else 2]
    return [torch.randn(each, generator=numbers, requires_grad=True) for each in shapes]


@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_exact_products(shape, bias, used):
    inputs = tensors(*shape, bias=bias)
    with OneDnnProducts():
        output = F.linear(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output * weights).sum(), inputs)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = exact[0] @ exact[1].T + (exact[2] if bias else 0)
    gradients = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for ours, theirs in zip([output, *found], [expected, *gradients], strict=True):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert used == [(*shape, 24), (*shape, 40), (40, 48)]


def test_only_the_gradients_that_are_asked_for_are_computed(used):
    inputs, weight, bias = tensors(48)
    weight.requires_grad_(False)
    with OneDnnProducts():
        F.linear(inputs, weight, bias).sum().backward()
    assert used == [(48, 24), (48, 40)] and weight.grad is None and inputs.grad is not None and bias.grad is not None


class Traced(torch.Tensor):
    """Like those of an export."""


@pytest.mark.parametrize(
    "inputs, weight",
    [
        (torch.ones(48), torch.ones(40, 48)),
        (torch.ones(0, 24), torch.ones(40, 24)),
        (torch.ones(48, 24, dtype=torch.float64), torch.ones(40, 24, dtype=torch.float64)),
        (torch.ones(48, 24, dtype=torch.bfloat16), torch.ones(40, 24, dtype=torch.bfloat16)),
        (torch.ones(48, 24).to_mkldnn(), torch.ones(40, 24)),
        (torch.ones(48, 24), torch.ones(40, 24).as_subclass(Traced)),
        (torch.ones(48, 24).as_subclass(Traced), torch.ones(40, 24)),
    ],
)
def test_other_products_are_left_to_torch(inputs, weight, used):
    assert not suits(1, inputs, weight)
    with OneDnnProducts():
        F.linear(inputs, weight)
    assert not used


def test_autocast_is_left_to_torch(used):
    with OneDnnProducts(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(*tensors(48)).dtype == torch.bfloat16
    assert not used


def test_it_holds_for_the_thread_that_entered_it(used):
    def multiply() -> None:
        F.linear(*tensors(48))

    with OneDnnProducts():
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()
    assert not used


def test_few_rows_are_left_to_torch_but_in_training(used, everywhere):
    """Where the processes of a step have different numbers of rows, and must agree."""
    cpu = torch.device("cpu")
    for tokens, rows, counted in ((48, 31, 0), (48, 32, 1), (None, 1, 2)):
        with fast_products(cpu, tokens):
            F.linear(torch.ones(rows, 24), torch.ones(40, 24))
        assert len(used) == counted


def test_few_tokens_and_other_devices_are_left_to_torch(everywhere):
    cpu = torch.device("cpu")
    assert isinstance(fast_products(cpu), OneDnnProducts) and isinstance(fast_products(cpu, 32), OneDnnProducts)
    assert not isinstance(fast_products(cpu, 31), OneDnnProducts)
    assert not isinstance(fast_products(torch.device("cuda")), OneDnnProducts)


@pytest.mark.parametrize(
    "capability, cpuinfo, expected",
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t: 2\n", True),
        ("AVX512", "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t: 17\n", False),
        ("AVX512", "vendor_id\t: AuthenticAMD\n", False),
        ("AVX512", "vendor_id\t: GenuineIntel\ncpu family\t: 26\n", False),
        ("AVX2", "vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", False),
    ],
)
def test_the_processor_decides(capability, cpuinfo, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_products, "Path", lambda name: tmp_path / name.removeprefix("/proc/"))
    assert onednn_is_faster.__wrapped__() is expected


def test_vectors_are_the_same_either_way(tmp_path, everywhere, used, monkeypatch):
    model = tiny_bert(tmp_path / "bert")
    texts = ["a word of it", "is it " * 40, "where is a text of it " * 20]
    fast = Embedder(model).encode(texts)
    assert used
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: False)
    used.clear()
    plain = Embedder(model).encode(texts)
    assert not used
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-6)
