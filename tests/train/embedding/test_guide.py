"""Vectors of a guide: computed once, looked up by id, and what they leave out of a step's negatives."""

import numpy as np
import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert
from training_runs import embedding_records, read_metrics, train, write_jsonl

from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.step_records import QUERY_MARK
from rag_retrieval.data.store import open_store
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.train.embedding import guide
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.guide import open_guide


@pytest.fixture
def other(tmp_path) -> str:
    """An embedder that is not the one that is trained."""
    return tiny_bert(tmp_path / "guide", seed=7)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    first = [{"query": "rain", "pos": ["water falls"], "neg": ["a city"]}, {"query": "Paris", "pos": ["a  city"]}]
    second = [{"query": "rain", "pos": ["rain"]}]
    paths = [write_jsonl(tmp_path / f"{place}.jsonl", records) for place, records in enumerate((first, second))]
    return [open_store(path, RecordRules(for_embedder=True), group_by_query=True) for path in paths]


def test_every_text_has_the_guide_s_vector_under_its_id(stores, other, monkeypatch):
    monkeypatch.setattr(guide, "CHUNK", 2)
    found = open_guide(other, stores, 1)
    embedder = Embedder(other, normalize=False)
    assert len(found.ids) == 5, "rain and Paris as queries; water falls, a city and rain as documents"
    for ids, expected in (
        (stores[0].query_ids ^ QUERY_MARK, embedder.encode_queries(["rain", "Paris"])),
        (stores[0].document_ids, embedder.encode_documents(["water falls", "a city", "a city"])),
        (stores[1].document_ids, embedder.encode_documents(["rain"])),
    ):
        np.testing.assert_allclose(found.of(ids), expected, atol=1e-5)


def test_vectors_are_computed_once_for_a_model_and_its_data(stores, other, monkeypatch, bert):
    open_guide(other, stores, 1)
    monkeypatch.setattr(guide, "run_encoded", None)
    assert len(open_guide(other, stores, 1).ids) == 5
    for model, data in ((bert, stores), (other, stores[:1])):
        with pytest.raises(TypeError):
            open_guide(model, data, 1)
    assert not list(guide.cache_folder().glob("*.building-*"))


def test_a_guide_whose_vectors_are_not_finite_is_refused_and_nothing_is_kept(stores, tmp_path):
    model = EmbeddingModel.from_pretrained(tiny_bert(tmp_path / "guide", seed=7))
    model.save_pretrained(tmp_path / "huge")
    weights = load_file(tmp_path / "huge" / "model.safetensors")
    for name in ("attention.output.LayerNorm", "output.dense"):  # finite themselves, as the opener asks
        weights[f"encoder.layer.1.{name}.bias"][0] = 3e38
    save_file(weights, tmp_path / "huge" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="guide_model .*huge: it gave a vector that is not finite"):
        open_guide(str(tmp_path / "huge"), stores, 1)
    assert not [path for path in guide.cache_folder().glob("guide-*") if path.is_dir()]


def test_a_wait_for_another_process_has_a_bound(stores, other):
    open_guide(other, stores, 1)
    (folder,) = (path for path in guide.cache_folder().glob("guide-*") if path.is_dir())
    with FileLock(f"{folder}.lock"), pytest.raises(ValueError, match="has held .*lock for 0.001 minutes"):
        open_guide(other, stores, 0.001)


def test_a_run_leaves_out_what_its_guide_finds_as_close_as_the_positive(settings, bert, other, tmp_path):
    """The base itself as the guide judges the first step as the model does; another model judges otherwise."""

    def first_loss(name: str, **judge) -> float:
        train(settings(embedding_records(16), output_dir=str(tmp_path / name), false_negative_margin=0.0, **judge))
        return read_metrics(tmp_path / name, "train")[0]["loss"]

    by_model = first_loss("model", false_negative_judge="model")
    by_itself = first_loss("itself", false_negative_judge="guide", guide_model=bert)
    by_other = first_loss("other", false_negative_judge="guide", guide_model=other)
    assert by_itself == pytest.approx(by_model, rel=1e-5)
    assert by_other != pytest.approx(by_model, rel=1e-2)


def test_a_guide_needs_a_model_and_a_margin():
    required = {"model_name_or_path": "m", "train_dataset": "t.jsonl", "output_dir": "o"}
    with pytest.raises(ValueError, match="(?s)guide_model.*false_negative_margin"):
        EmbeddingConfig(**required, false_negative_judge="guide")
    config = EmbeddingConfig(**required, guide_model="g")
    assert config.guide_model is None and "guide_model" in config.ignored
