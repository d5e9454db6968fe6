"""The layers that int8 cannot do with: found by what each costs, and left in float32."""

import json

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
import torch  # noqa: E402
from beir_samples import write, write_lines  # noqa: E402
from embedder_samples import FAMILIES  # noqa: E402
from exported_samples import exported  # noqa: E402
from tiny_models import CHINESE, ENGLISH  # noqa: E402

from rag_retrieval import Embedder  # noqa: E402
from rag_retrieval.export.layer_costs import (  # noqa: E402
    LayerCost,
    describe_costs,
    fewest_to_exclude,
    layer_costs,
)
from rag_retrieval.export.verify import Change, DifferenceError, Verification  # noqa: E402
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


def test_each_layer_is_measured_once_and_has_the_worst_measures_of_its_representations():
    """b has a lower rank correlation than a, though a loses more nDCG@10."""
    changes = {
        "a": {"dense": Change(0.1, 0.97, 0.8, 0.8, 0.5, 0.4), "lexical": Change(0.3, 0.98, 0.7, 0.6, 0.5, 0.5)},
        "b": {"dense": Change(0.2, 0.96, 0.8, 0.85, 0.5, 0.5), "lexical": Change(0.1, 0.99, 0.7, 0.7, 0.5, 0.5)},
    }
    others = []

    def verified(excluded) -> Verification:
        others.append(excluded)
        return Verification(1, 1, 1, changes["a" if excluded == ["b"] else "b"])

    costs = layer_costs(["a", "b"], verified)
    assert others == [["b"], ["a"]]
    assert costs == [
        LayerCost("b", Change(0.2, 0.96, 0.7, 0.7, 0.5, 0.5)),
        LayerCost("a", Change(0.3, 0.97, 0.7, 0.6, 0.5, 0.4)),
    ]


def test_the_table_has_the_measures_there_are_and_whole_names():
    name = "encoder.layers.11.attention.self.projections.query_key_value"
    head, row = describe_costs([LayerCost(name, Change(0.3, 0.97, 0.7, 0.6, 0.5, 0.4))], [name]).splitlines()
    assert head.split()[-6:] == ["nDCG@10", "Spearman's", "correlation", "with", "the", "labels"]
    assert row.split() == [name, "0.97000", "3.0e-01", "0.6000", "(-0.1000)", "0.4000", "(-0.1000)", "float32"]
    head, row = describe_costs([LayerCost(name, Change(0.3, 0.97))], []).splitlines()
    assert head.endswith("largest difference") and row.split() == [name, "0.97000", "3.0e-01"]


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
    assert first["name"] == BROKEN and first["change"]["rank_correlation"] < 0.9
    assert len(others) == 12 and min(each["change"]["rank_correlation"] for each in others) > 0.98
    assert first["change"]["ndcg_before"] is None, "without data"
    kinds = {value.name: value.data_type for value in onnx.load(folder / "model.onnx").graph.initializer}
    weights = [kind for name, kind in kinds.items() if name.endswith("/int8")]
    assert weights == [onnx.TensorProto.INT8] * 12, "word embeddings and all products but one"


def test_with_data_each_layer_has_the_ndcg_of_an_export_of_it_alone_in_int8(broken_model, tmp_path):
    texts = [f"{text} {number}" for number in range(5) for text in (*ENGLISH, *CHINESE)][:30]
    queries = {f"q{place}": texts[place][: len(texts[place]) // 2] for place in range(0, 30, 6)}
    write_lines(tmp_path / "corpus.jsonl", [{"_id": f"d{place}", "text": text} for place, text in enumerate(texts)])
    write_lines(tmp_path / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    write(tmp_path / "qrels/test.tsv", "".join(f"{name}\td{name[1:]}\t1\n" for name in queries))
    given = {"quantize": "int8", "data": str(tmp_path), "force": True}
    auto = exported(broken_model, tmp_path / "auto", exclude_layers=["auto"], **given)
    costs = json.loads((auto / "embedder_onnx.json").read_text())["verification"]["layer_costs"]
    others = [cost["name"] for cost in costs if cost["name"] != BROKEN]
    alone = exported(broken_model, tmp_path / "alone", exclude_layers=others, **given)
    with Embedder(alone) as embedder:
        scores = embedder.encode_queries(list(queries.values())) @ embedder.encode_documents(texts).T
    ranks = [1 + int((own > own[int(name[1:])]).sum()) for name, own in zip(queries, scores, strict=True)]
    expected = np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])
    first = costs[0]["change"]
    assert costs[0]["name"] == BROKEN and first["ndcg_after"] == pytest.approx(expected)
    assert abs(first["ndcg_after"] - first["ndcg_before"]) > 0.01, "int8 of this layer does change the order"
    assert {cost["change"]["ndcg_before"] for cost in costs} == {first["ndcg_before"]}


def test_layers_that_are_named_stay_in_float32_and_unknown_names_are_refused(broken_model, tmp_path):
    folder = exported(broken_model, tmp_path / "out", quantize="int8", exclude_layers=[BROKEN, "layer.1.attention.*"])
    measured = json.loads((folder / "embedder_onnx.json").read_text())["verification"]
    kept = [f"encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
    assert measured["excluded_layers"] == [BROKEN, *kept] and measured["layer_costs"] == []
    with pytest.raises(ValueError, match=r"no layer matches 'layer.7.\*'; the layers are embeddings.word_embeddings, "):
        exported(broken_model, tmp_path / "none", quantize="int8", exclude_layers=["layer.7.*"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
