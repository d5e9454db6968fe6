"""What the keys of the model make of a run: every pooling, projections and decoders are trained, saved and opened."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from tiny_models import tiny_qwen2
from training_runs import train

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.run import load_embedder

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
        vectors = model(make_batch(model.text_encoder.encode(TEXTS, "query")))
    assert vectors.shape == (2, model.dim) and torch.isfinite(vectors).all()


def test_a_model_that_is_trained_by_products_is_compared_by_them(settings):
    assert load_embedder(EmbeddingConfig(**settings(normalize=False))).settings.similarity == "dot"
    assert load_embedder(EmbeddingConfig(**settings())).settings.similarity == "cosine"


def test_numbers_beyond_the_widest_width_are_told(settings, caplog):
    load_embedder(EmbeddingConfig(**settings(use_mrl=True, mrl_dims=[16, 32])))
    assert "mrl_dims" not in caplog.text
    load_embedder(EmbeddingConfig(**settings(use_mrl=True, mrl_dims=[16, 8])))
    assert "mrl_dims" in caplog.text and "32" in caplog.text
