"""The layers that int8 cannot do with: found by what each costs, and left in float32."""

import json

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
import torch  # noqa: E402
from embedder_samples import FAMILIES  # noqa: E402
from exported_samples import exported  # noqa: E402

from rag_retrieval.export.layer_costs import fewest_to_exclude  # noqa: E402
from rag_retrieval.export.verify import DifferenceError  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402

BROKEN = "encoder.layer.0.output.dense"


@pytest.mark.parametrize("needed", range(9))
def test_as_few_layers_as_needed_are_excluded_in_few_trials(needed):
    names, tried = list("abcdefgh"), []

    def within_limits(excluded) -> bool:
        tried.append(len(excluded))
        return len(excluded) >= needed

    assert fewest_to_exclude(names, within_limits) == names[:needed]
    assert len(tried) == len(set(tried)) <= 7, tried


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory):
    """What goes into one product has a value of 1,000 that its weights ignore. In float32 that changes nothing; in 8
    bits all others are less than half a step of it."""
    root = tmp_path_factory.mktemp("broken")
    model = EmbeddingModel.from_pretrained(FAMILIES["bert"](root / "base"), max_length=64)
    layer = model.model.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.bias[0] = 1000.0
        layer.output.dense.weight[:, 0] = 0
    model.save_pretrained(root / "model")
    return root / "model"


def test_a_layer_that_int8_breaks_is_found_and_stays_in_float32(broken_model, tmp_path):
    with pytest.raises(DifferenceError, match="leave the costliest layers in float32 with --exclude_layers auto"):
        exported(broken_model, tmp_path / "refused", quantize="int8")
    folder = exported(broken_model, tmp_path / "out", quantize="int8", exclude_layers=["auto"])
    measured = json.loads((folder / "embedder_onnx.json").read_text())["verification"]
    assert measured["excluded_layers"] == [BROKEN] and measured["kept_by_force"] == []
    first, *others = measured["layer_costs"]
    assert first["name"] == BROKEN and first["rank_correlation"] < 0.9
    assert len(others) == 12 and min(each["rank_correlation"] for each in others) > 0.98
    kinds = {value.name: value.data_type for value in onnx.load(folder / "model.onnx").graph.initializer}
    weights = [kind for name, kind in kinds.items() if name.endswith("/int8")]
    assert weights == [onnx.TensorProto.INT8] * 12, "word embeddings and all products but one"


def test_layers_that_are_named_stay_in_float32_and_unknown_names_are_refused(broken_model, tmp_path):
    folder = exported(broken_model, tmp_path / "out", quantize="int8", exclude_layers=[BROKEN, "layer.1.attention.*"])
    measured = json.loads((folder / "embedder_onnx.json").read_text())["verification"]
    kept = [f"encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
    assert measured["excluded_layers"] == [BROKEN, *kept] and measured["layer_costs"] == []
    with pytest.raises(ValueError, match=r"no layer matches 'layer.7.\*'; the layers are embeddings.word_embeddings, "):
        exported(broken_model, tmp_path / "none", quantize="int8", exclude_layers=["layer.7.*"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
