"""What the keys of the model make of a run: every pooling, projections and decoders are trained, saved and opened."""

import logging
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from tiny_models import tiny_bert, tiny_qwen2
from training_runs import train
from transformers import AutoConfig, AutoModel

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.embedding import config
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.run import configured_objective, load_embedder

TEXTS = ["what is a panda?", "The giant panda is a bear that lives in China. " * 3]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> str:
    return tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.mark.parametrize(
    ("decoder", "changes"),
    [
        (False, {"pooling": "cls", "cls_interval": 8}),
        (False, {"pooling": "weighted_mean", "use_mrl": True, "mrl_dims": [48, 16]}),
        (False, {"query_instruction": "a question: ", "include_prompt": False}),
        (True, {"pooling": "latent_attention", "bidirectional": True}),
        (True, {"lora_r": 2, "use_mrl": True, "mrl_dims": [48, 16], "query_instruction": "a question: "}),
    ],
)
def test_a_run_trains_and_saves_the_model_that_its_keys_ask_for(settings, qwen2, decoder, changes):
    values = settings(**changes)
    if decoder:
        values["model_name_or_path"] = qwen2
    train(values)
    model = EmbeddingModel.from_pretrained(Path(values["output_dir"]) / "model").eval()
    wanted = {name: value for name, value in changes.items() if hasattr(model.settings, name)}
    assert {name: getattr(model.settings, name) for name in wanted} == wanted
    widths = tuple(changes.get("mrl_dims", ()))
    assert model.settings.dims == widths and model.dim == max(widths, default=32)
    assert model.packs and not model.new_parameters
    start = {name: changes[name] for name in ("pooling", "bidirectional", "cls_interval") if name in changes}
    set_seed(42)  # as the run began
    fresh = EmbeddingModel.from_pretrained(values["model_name_or_path"], dims=changes.get("mrl_dims"), **start)
    for name, parameter in fresh.named_parameters():
        if name.startswith("heads."):
            assert not torch.equal(parameter, model.get_parameter(name)), f"{name} was not trained"
    with torch.no_grad():
        vectors = model(make_batch(model.text_encoder.encode(TEXTS, "query"))).dense
    assert vectors.shape == (2, model.dim) and torch.isfinite(vectors).all()


def test_a_model_that_is_trained_by_products_is_compared_by_them(settings):
    assert load_embedder(EmbeddingConfig(**settings(normalize=False))).settings.similarity == "dot"
    assert load_embedder(EmbeddingConfig(**settings())).settings.similarity == "cosine"


def test_numbers_beyond_the_widest_width_are_told(settings, caplog):
    load_embedder(EmbeddingConfig(**settings(use_mrl=True, mrl_dims=[16, 32])))
    assert "mrl_dims" not in caplog.text
    load_embedder(EmbeddingConfig(**settings(use_mrl=True, mrl_dims=[16, 8])))
    assert "mrl_dims" in caplog.text and "32" in caplog.text


@pytest.mark.parametrize("changes, trained", [({}, (4, 8, 32)), ({"mrl_weights": [1, 1]}, (4, 8))])
def test_default_widths_and_the_models_own_are_trained(settings, caplog, monkeypatch, changes, trained):
    monkeypatch.setattr(config, "DEFAULT_WIDTHS", (4, 8))
    made = EmbeddingConfig(**settings(use_mrl=True, **changes))
    model = load_embedder(made)
    assert configured_objective(made).widths_of(model.dim)[0] == model.settings.dims == trained
    assert ("mrl_dims" in caplog.text) == (32 not in trained)


@pytest.fixture
def short_model(tmp_path):
    """With 64 positions."""
    folder = tiny_bert(tmp_path / "short")
    AutoModel.from_config(AutoConfig.from_pretrained(folder, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def test_default_lengths_are_cut_to_the_positions_of_the_model(settings, short_model, caplog):
    caplog.set_level(logging.INFO)
    values = settings(model_name_or_path=short_model)
    model = load_embedder(EmbeddingConfig(**{name: value for name, value in values.items() if "max_len" not in name}))
    assert (model.text_encoder.max_length_of("document"), model.text_encoder.max_length_of("query")) == (64, 64)
    assert "passage_max_len: 64" in caplog.text and "query_max_len: 64" in caplog.text


@pytest.mark.parametrize("key", ["query_max_len", "passage_max_len"])
def test_a_given_length_beyond_the_positions_is_an_error_of_its_key(settings, short_model, key):
    load_embedder(EmbeddingConfig(**settings(model_name_or_path=short_model, **{key: 64})))
    with pytest.raises(ValueError, match=f"^{key} 65 .* 64 "):
        load_embedder(EmbeddingConfig(**settings(model_name_or_path=short_model, **{key: 65})))
