"""Runs of several representations: what learns, what is refused, and what is said of what a model gives."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import train
from unified_runs import all_weights, with_heads

from rag_retrieval import Embedder
from rag_retrieval.core.distributed import StartError
from rag_retrieval.models.embedder import EmbeddingModel

ALL = ["dense", "lexical", "multi_vector"]


@pytest.fixture(scope="module")
def m3(tmp_path_factory, bert) -> str:
    return with_heads(bert, tmp_path_factory.mktemp("m3") / "model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bert) -> dict[str, str]:
    """Of models without a dense vector."""
    folder = tmp_path_factory.mktemp("others")
    kinds = {"splade": {"representations": ["lexical"], "lexical": "splade"},
             "colbert": {"representations": ["multi_vector"], "colbert_dim": 16}}  # fmt: skip
    for kind, options in kinds.items():
        (folder / kind).mkdir()
        EmbeddingModel.from_pretrained(bert, **options).save_pretrained(folder / kind)
    return {kind: str(folder / kind) for kind in kinds}


def test_fix_encoder_trains_the_heads_alone(settings, m3):
    values = settings(model_name_or_path=m3, representations=ALL, fix_encoder=True)
    train(values)
    before, after = all_weights(Path(m3).parent), all_weights(values["output_dir"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{head}.{name}" for head in ("sparse_linear", "colbert_linear") for name in ("weight", "bias")}


def test_lora_trains_heads_in_full_and_writes_a_merged_model(settings, m3):
    values = settings(model_name_or_path=m3, representations=ALL, lora_r=4, lora_target_modules="all-linear", lr=1e-2)
    train(values)
    before, after = all_weights(Path(m3).parent), all_weights(values["output_dir"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"sparse_linear.weight", "colbert_linear.weight", "encoder.layer.0.attention.self.query.weight"} <= changed


def test_a_model_that_gives_something_else_must_be_named(settings, folders):
    for kind, message in (("colbert", "representations: .* gives multi_vector"), ("splade", "gives lexical")):
        with pytest.raises(StartError, match=message):
            train(settings(model_name_or_path=folders[kind]))
    with pytest.raises(StartError, match="lexical_method: .* is splade"):
        train(settings(model_name_or_path=folders["splade"], representations="lexical"))
    with pytest.raises(StartError, match="16 numbers, and colbert_dim is 8"):
        train(settings(model_name_or_path=folders["colbert"], representations="multi_vector", colbert_dim=8))


def test_what_a_model_gives_and_is_not_trained_is_said(settings, m3, caplog):
    caplog.set_level(logging.WARNING)
    values = settings(model_name_or_path=m3, representations="dense,lexical")
    train(values)
    assert caplog.text.count("also gives multi_vector, which is not trained") == 1
    files = {file.name for file in (Path(values["output_dir"]) / "model").iterdir()}
    assert "sparse_linear.pt" in files and "colbert_linear.pt" not in files


def test_lexical_weights_that_are_all_0_are_reported(settings, m3, tmp_path, caplog):
    shutil.copytree(m3, tmp_path / "dead")
    head = torch.load(tmp_path / "dead" / "sparse_linear.pt", weights_only=True)
    torch.save({**head, "bias": head["bias"] - 1000}, tmp_path / "dead" / "sparse_linear.pt")
    caplog.set_level(logging.WARNING)
    train(settings(model_name_or_path=str(tmp_path / "dead"), representations="dense,lexical"))
    assert caplog.text.count("no query and no document has a lexical weight above 0") == 1


@pytest.mark.parametrize("mean", [True, False])
def test_mean_maxsim_is_that_of_the_saved_model_too(settings, mean):
    values = settings(representations="multi_vector", colbert_dim=8, query_max_len=8, mean_maxsim=mean)
    train(values)
    assert EmbeddingModel.from_pretrained(Path(values["output_dir"]) / "model").settings.multi_vector_mean is mean


def test_scores_of_the_saved_model_are_mixed_as_in_training(settings, m3):
    values = settings(model_name_or_path=m3, representations=ALL, ensemble_weights={"lexical": 0.5, "dense": 2.0})
    train(values)
    trained = Embedder(Path(values["output_dir"]) / "model", device="cpu")
    found = trained.compute_score([["a panda", "the panda eats"]])
    expected = 2 * found.dense + 0.5 * found.lexical + found.multi_vector
    np.testing.assert_allclose(found.ensemble, expected, rtol=1e-6)


def test_a_decoder_learns_lexical_weights_by_its_own_head(settings, qwen2):
    values = settings(model_name_or_path=qwen2, representations="lexical", lexical_method="splade", temperature=1.0)
    train(values)
    model = EmbeddingModel.from_pretrained(Path(values["output_dir"]) / "model")
    assert (model.settings.representations, model.settings.lexical) == (("lexical",), "splade")
