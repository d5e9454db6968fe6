"""Folders of other programs, with lexical weights and token vectors: opened and written, with equal scores there."""

import json
from pathlib import Path

import pytest
import torch
from embedder_samples import TEXTS
from tiny_models import ENGLISH, HIDDEN
from transformers import AutoModel, AutoTokenizer

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.representations import Representations
from rag_retrieval.models.token_batch import make_batch


@torch.no_grad()
def representations_of(model: EmbeddingModel, texts=TEXTS, kind=None) -> Representations:
    return model.eval()(make_batch(model.text_encoder.encode(texts, kind)))


def dict_of_each(lexical) -> list[dict[int, float]]:
    """Of each text its ids with their weights, those of 0 left out."""
    parts = zip(*(values.split(lexical.counts.tolist()) for values in (lexical.ids, lexical.weights)), strict=True)
    return [{i: w for i, w in zip(ids.tolist(), weights.tolist(), strict=True) if w} for ids, weights in parts]


def assert_close(found: list[dict[int, float]], expected: list[dict[int, float]], atol: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        ids = one.keys() | other.keys()
        assert max((abs(one.get(i, 0) - other.get(i, 0)) for i in ids), default=0) < atol


# ---- BGE-M3 ---------------------------------------------------------------------------------------------

DENSE_ST = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True},
    "sentence_bert_config.json": {"max_seq_length": 48},
}


def bge_m3(base: str, folder: Path, colbert_dim: int = 24) -> Path:
    """As FlagEmbedding saves it: the model, the files of sentence-transformers, the two linear layers."""
    AutoModel.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    for name, values in DENSE_ST.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    torch.manual_seed(3)
    torch.save(torch.nn.Linear(HIDDEN, colbert_dim).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(HIDDEN, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


@torch.no_grad()
def slow_bge_m3(folder: Path, text: str) -> tuple[torch.Tensor, dict[int, float], torch.Tensor]:
    """One text, token by token, as the paper's section 3.1 and FlagEmbedding's layers have it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ids = tokenizer(text, truncation=True, max_length=48)["input_ids"]
    states = model(torch.tensor([ids])).last_hidden_state[0]
    sparse, colbert = (torch.load(folder / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    weights: dict[int, float] = {}
    for token, state in zip(ids, states, strict=True):
        weight = max(0.0, float(sparse["weight"][0] @ state + sparse["bias"]))
        if weight and token not in tokenizer.all_special_ids:
            weights[token] = max(weight, weights.get(token, 0.0))
    vectors = [colbert["weight"] @ state + colbert["bias"] for state in states[1:]]
    return states[0], weights, torch.stack([vector / vector.norm() for vector in vectors])


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_a_bge_m3_folder_gives_the_three_representations(base_folders, tmp_path, family):
    folder = bge_m3(base_folders[family], tmp_path / "theirs")
    model = open_embedder(folder)
    assert model.packs and model.settings.representations == ("dense", "lexical", "multi_vector")
    assert model.settings.pooling == "cls" and model.settings.multi_vector_mean
    found = representations_of(model)
    expected = [slow_bge_m3(folder, text) for text in TEXTS]
    torch.testing.assert_close(found.dense, torch.stack([each[0] for each in expected]), atol=1e-5, rtol=0)
    assert_close(dict_of_each(found.lexical), [each[1] for each in expected])
    vectors = found.multi_vector.vectors.split(found.multi_vector.counts.tolist())
    for one, (_, _, other) in zip(vectors, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "ours")
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert {"colbert_linear.pt", "sparse_linear.pt", "modules.json"} <= names and "embedder_config.json" not in names
    for one, other in zip(slow_bge_m3(tmp_path / "ours", ENGLISH[0]), slow_bge_m3(folder, ENGLISH[0]), strict=True):
        assert one == other if isinstance(one, dict) else torch.equal(one, other)
    again = open_embedder(tmp_path / "ours")
    assert again.settings == model.settings and not again.new_parameters
    assert torch.equal(representations_of(again).multi_vector.vectors, found.multi_vector.vectors)


def test_outputs_that_are_not_asked_for_are_not_computed(base_folders, tmp_path):
    model = open_embedder(bge_m3(base_folders["bert"], tmp_path))
    batch = make_batch(model.text_encoder.encode(TEXTS))
    with torch.no_grad():
        everything, dense = model(batch), model(batch, outputs=["dense"])
    assert dense.lexical is None and dense.multi_vector is None
    torch.testing.assert_close(dense.dense, everything.dense, atol=1e-5, rtol=0)
