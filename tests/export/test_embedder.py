"""The export of embedders: every pooling in the graph, what a folder holds, int8, cards, and options of rerankers."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
import torch  # noqa: E402
from beir_samples import write_toy  # noqa: E402
from embedder_samples import FAMILIES, PROMPTS, TEXTS  # noqa: E402
from exported_samples import exported, write_graph_once  # noqa: E402

from rag_retrieval import Embedder, Reranker  # noqa: E402
from rag_retrieval.cli import main  # noqa: E402
from rag_retrieval.export import run  # noqa: E402
from rag_retrieval.export.hub import stage  # noqa: E402
from rag_retrieval.export.verify import DifferenceError  # noqa: E402
from rag_retrieval.infer.encoded_texts import EncodedTexts  # noqa: E402
from rag_retrieval.infer.onnx_backend import OnnxEmbedder, open_session  # noqa: E402
from rag_retrieval.infer.onnx_folder import INPUTS, padded_inputs  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402
from rag_retrieval.models.token_batch import make_batch  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
KINDS = {  # family, and options that every pooling and every part of a graph is in
    "mean": ("bert", {"prompts": PROMPTS}),
    "cls": ("xlm_roberta", {"pooling": "cls"}),
    "mcls": ("bert", {"pooling": "cls", "cls_interval": 8, "max_length": 64, "query_max_length": 80}),
    "without_prompt": ("xlm_roberta", {"prompts": PROMPTS, "include_prompt": False, "query_max_length": 20}),
    "weighted_mean": ("bert", {"pooling": "weighted_mean", "normalize": False}),
    "latent_attention": ("bert", {"pooling": "latent_attention", "prompts": PROMPTS, "include_prompt": False}),
    "last": ("qwen2", {"prompts": PROMPTS}),
    "bidirectional": ("qwen2", {"pooling": "mean", "bidirectional": True, "max_length": 64}),
    "projection": ("llama", {"pooling": "weighted_mean", "dims": (16, 48)}),
}
ALL = ("dense", "lexical", "multi_vector")
REPRESENTATIONS = {  # likewise, what has lexical weights or token vectors
    "m3": ("xlm_roberta", {"representations": ALL, "pooling": "cls", "colbert_dim": 24, "max_length": 64}),
    "splade": ("bert", {"representations": ["lexical"], "lexical": "splade", "max_length": 48}),
    "colbert": ("bert", {"representations": ["multi_vector"], "colbert_dim": 16, "max_length": 48,
                         "query_max_length": 20}),
    "mcls": ("bert", {"representations": ALL, "lexical": "splade", "pooling": "cls", "cls_interval": 8,
                      "max_length": 64, "prompts": PROMPTS}),
    "without_prompt": ("xlm_roberta", {"representations": ["dense", "lexical"], "include_prompt": False,
                                       "prompts": PROMPTS, "max_length": 64}),
    "decoder": ("qwen2", {"representations": ["lexical", "multi_vector"], "lexical": "splade", "max_length": 64}),
    "colbert_decoder": ("qwen2", {"representations": ["multi_vector"], "max_length": 48}),
    "attending": ("llama", {"representations": ["multi_vector"], "attend_to_expansion_tokens": True,
                            "bidirectional": True, "max_length": 48}),
}  # fmt: skip
KINDS |= {f"{kind}_representations": value for kind, value in REPRESENTATIONS.items()}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The folder of a model of KINDS. Read only."""
    root, made = tmp_path_factory.mktemp("embedders"), {}

    def folder(kind: str):
        if kind not in made:
            family, options = KINDS[kind]
            torch.manual_seed(0)  # of new heads
            model = EmbeddingModel.from_pretrained(FAMILIES[family](root / f"{kind}-base"), **options)
            model.save_pretrained(root / kind)
            made[kind] = root / kind
        return made[kind]

    return folder


def check_vectors(model, folder) -> None:
    of_torch, embedder = Embedder(model, device="cpu"), Embedder(folder)
    assert embedder.settings == of_torch.settings and embedder.dim == of_torch.dim
    outputs = embedder.settings.representations
    for name in ("encode", "encode_queries", "encode_documents"):
        expected = getattr(of_torch, name)(TEXTS, outputs=outputs)
        for batch_size in (256, 1):
            assert_same(getattr(embedder, name)(TEXTS, outputs=outputs, batch_size=batch_size), expected)


def assert_same(found: EncodedTexts, expected: EncodedTexts) -> None:
    if expected.dense is not None:
        np.testing.assert_allclose(found.dense, expected.dense, atol=1e-5 * max(1, abs(expected.dense).max()))
    for place in range(len(expected.lexical or ())):
        weights = expected.lexical.by_id(place)
        for token, weight in found.lexical.by_id(place).items() | weights.items():  # 0 where one has none
            assert weight == pytest.approx(weights.get(token, 0), abs=1e-5 * max(1, *weights.values()))
    for mine, theirs in zip(found.multi_vector or (), expected.multi_vector or (), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_folder_holds_all_that_its_vectors_need_and_what_was_measured(model_of, tmp_path):
    folder = exported(model_of("mean"), tmp_path / "out")
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == {
        "model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "embedder_onnx.json", "modules.json",
        "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    }  # fmt: skip
    described = json.loads((folder / "embedder_onnx.json").read_text())
    assert described["inputs"] == ["input_ids", "attention_mask"] and described["precision"] == "float32"
    assert described["settings"]["prompts"] == PROMPTS and described["source"]["class"] == "BertModel"
    measured = described["verification"]
    assert measured["longest"] == 512 and measured["data"] is None
    assert list(measured["changes"]) == ["dense"] and measured["changes"]["dense"]["max_difference"] < 1e-4
    check_vectors(model_of("mean"), folder)


def test_the_command_and_the_block_of_the_page_run(model_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "write_graph", write_graph_once)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_of("mean"), "runs/e/model")
    page = PAGE.read_text(encoding="utf-8")
    (command,) = re.findall(r"^rag-retrieval (export --model runs/e/model .*)$", page, flags=re.MULTILINE)
    assert main(command.split()) == 0
    section = page.partition("## Embedders")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = {}
    exec(block, names)
    assert names["queries"].shape == names["documents"].shape == (2, 32)


def test_other_programs_read_vectors_of_length_one_from_free_axes(model_of, tmp_path):
    folder = exported(model_of("mean"), tmp_path / "out")
    session = open_session(folder / "model.onnx", "cpu", 1)
    assert [node.name for node in session.get_outputs()] == ["vectors", "sentence_embedding"]
    assert {tuple(node.shape) for node in session.get_inputs()} == {("texts", "length")}
    embedder = Embedder(folder)
    texts = embedder.backend.text_encoder.encode(TEXTS)
    (found,) = session.run(["sentence_embedding"], padded_inputs(make_batch(texts), INPUTS[:2], 0))
    np.testing.assert_allclose(found, embedder.encode(TEXTS), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_every_pooling_and_every_representation_are_those_of_torch(model_of, tmp_path, kind):
    folder = exported(model_of(kind), tmp_path / "out")
    check_vectors(model_of(kind), folder)
    described = json.loads((folder / "embedder_onnx.json").read_text())
    settings = Embedder(folder).settings
    assert described["verification"]["longest"] == max(settings.max_lengths.values())
    assert tuple(described["verification"]["changes"]) == settings.representations
    assert ("prompt_tokens" in described["inputs"]) == (
        kind in ("without_prompt", "latent_attention", "without_prompt_representations")
    )


def test_a_graph_that_does_not_compute_the_vectors_is_refused(model_of, tmp_path, monkeypatch):
    encode = OnnxEmbedder.encode
    monkeypatch.setattr(OnnxEmbedder, "encode", lambda *given: {"dense": encode(*given)["dense"] + 2e-2})
    with pytest.raises(DifferenceError, match="does not compute what the model computes"):
        exported(model_of("mean"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_int8_has_small_weights_and_ranks_nearly_alike(model_of, tmp_path):
    data = write_toy(tmp_path / "toy")
    folder = exported(model_of("mean"), tmp_path / "out", quantize="int8", data=str(data), depth=4, force=True)
    weights = [value.name for value in onnx.load(folder / "model.onnx").graph.initializer if value.data_type == 3]
    small = [name for name in weights if name.endswith("/int8")]
    assert len(small) == 12 + 1, "every product with weights, of two layers, and the word embeddings"
    measured = json.loads((folder / "embedder_onnx.json").read_text())["verification"]
    change = measured["changes"]["dense"]
    assert change["rank_correlation"] > 0.9 and 0 < change["ndcg_after"] <= 1 and measured["data"] == "toy test"
    exact, small = Embedder(model_of("mean"), device="cpu").encode(TEXTS), Embedder(folder).encode(TEXTS)
    cosines = (exact * small).sum(axis=1)
    assert cosines.min() > 0.9 and cosines.max() < 1 - 1e-6
    alone = np.stack([Embedder(folder).encode(text) for text in TEXTS])
    np.testing.assert_allclose(alone, small, atol=1e-5, err_msg="a vector depends on the texts beside it")


@pytest.mark.slow
def test_heads_of_weights_and_token_vectors_stay_in_float32_in_int8(model_of, tmp_path):
    folder = exported(model_of("m3_representations"), tmp_path / "out", quantize="int8", force=True)
    shapes = [list(value.dims) for value in onnx.load(folder / "model.onnx").graph.initializer if value.data_type == 1]
    assert any(sorted(shape) == [1, 32] for shape in shapes) and any(sorted(shape) == [24, 32] for shape in shapes)
    changes = json.loads((folder / "embedder_onnx.json").read_text())["verification"]["changes"]
    assert list(changes) == list(ALL) and all(each["rank_correlation"] > 0.8 for each in changes.values())
    found = Embedder(folder).encode(TEXTS, outputs=ALL)
    assert len(found.lexical) == len(found.multi_vector) == len(TEXTS)


@pytest.mark.slow
def test_a_colbert_s_queries_are_filled_up_to_the_length_that_is_given(model_of, tmp_path):
    folder, given = exported(model_of("colbert_representations"), tmp_path / "out"), {"query_max_length": 12}
    embedder, of_torch = Embedder(folder, **given), Embedder(model_of("colbert_representations"), device="cpu", **given)
    found = embedder.encode_queries(TEXTS, outputs=["multi_vector"])
    assert {len(vectors) for vectors in found.multi_vector} == {12}
    assert_same(found, of_torch.encode_queries(TEXTS, outputs=["multi_vector"]))
    pairs = [(TEXTS[0], text) for text in TEXTS]
    assert Reranker(folder).compute_score(pairs) == pytest.approx(
        Reranker(model_of("colbert_representations"), device="cpu").compute_score(pairs), abs=1e-4
    )


@pytest.mark.slow
def test_the_projection_stays_in_float32_in_int8(model_of, tmp_path):
    folder = exported(model_of("projection"), tmp_path / "out", quantize="int8", force=True)
    shapes = [list(value.dims) for value in onnx.load(folder / "model.onnx").graph.initializer if value.data_type == 1]
    assert any(sorted(shape) == [32, 48] for shape in shapes)


def test_the_command_ignores_options_of_rerankers_with_a_warning(model_of, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run, "write_graph", write_graph_once)
    caplog.set_level(logging.WARNING, logger="rag_retrieval")
    command = ["export", "--model", str(model_of("mean")), "--output", str(tmp_path / "out"), "--max_length", "48"]
    assert main([*command, "--seq", "x", "--query_max_length", "20"]) == 0
    assert any("is an embedder; ignored, since only for rerankers: seq" in each.message for each in caplog.records)
    settings = Embedder(tmp_path / "out").settings
    assert (settings.max_length, settings.query_max_length) == (48, 20)


def test_a_plain_encoder_is_an_embedder_where_pooling_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "write_graph", write_graph_once)
    base = FAMILIES["bert"](tmp_path / "base")
    command = ["export", "--model", base, "--output", str(tmp_path / "out")]
    assert main(command) == 2 and "Give a reranker" in capsys.readouterr().err
    assert main([*command, "--pooling", "mean", "--prompts", "query: "]) == 2
    assert '--prompts: expected texts by name, as {"query": "query: "}, found "query: "' in capsys.readouterr().err
    assert main([*command, "--pooling", "mean", "--prompts", '{"query": "查询：", "document": ""}']) == 0
    settings = Embedder(tmp_path / "out").settings
    assert settings.pooling == "mean" and settings.prompts == {"query": "查询：", "document": ""}


def test_an_exported_folder_is_staged_with_a_card_that_says_how_to_open_it(model_of, tmp_path):
    folder = exported(model_of("mean"), tmp_path / "out")
    stage(folder, tmp_path / "look", "org/name", language=["zh"])
    assert (tmp_path / "look" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    text = (tmp_path / "look" / "README.md").read_text()
    assert 'Embedder("org/name")' in text and "hf download org/name --local-dir org/name" in text and "- zh" in text
    assert "query: query: " in text and "SentenceTransformer(" not in text
    stage(model_of("mean"), tmp_path / "of_torch", "org/name")
    text = (tmp_path / "of_torch" / "README.md").read_text()
    assert "SentenceTransformer(" in text and "hf download" not in text

