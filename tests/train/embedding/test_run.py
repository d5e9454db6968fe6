"""Runs of an embedder: what is trained, what a run leaves behind, and what it says."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import embedding_records, final_weights, read_metrics, train, write_yaml
from transformers import AutoModel, BertConfig

from rag_retrieval import cli
from rag_retrieval.core.distributed import StartError
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.embedding import task
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.run import graph_tokens
from rag_retrieval.train.embedding.train_embedding import main

TEXTS = ["what is a panda?", "The giant panda is a bear that lives in China. " * 9]


def vectors(folder: Path, kind: str) -> torch.Tensor:
    model = EmbeddingModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.nn.functional.normalize(model(make_batch(model.text_encoder.encode(TEXTS, kind))).dense)


def changed(model: str, values: dict) -> set[str]:
    """Names of the weights that a run changed."""
    before, after = AutoModel.from_pretrained(model).state_dict(), final_weights(values["output_dir"])
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_a_script_trains_a_folder_that_sentence_transformers_opens_with_equal_vectors(settings, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    values = settings(query_instruction="query: ", query_max_len=48)
    file = write_yaml(tmp_path / "run.yaml", values)
    assert main(["--config", file]) == 0
    assert cli.main(["train", "--config", file, "--overwrite_output_dir"]) == 0, "task is in the file"
    folder = Path(values["output_dir"]) / "model"
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    for kind in ("query", "document"):
        expected = theirs.encode(TEXTS, prompt_name=kind, convert_to_tensor=True)
        torch.testing.assert_close(vectors(folder, kind), expected, atol=1e-6, rtol=0)
    assert theirs.prompts["query"] == "query: " and theirs.max_seq_length == 48


def test_the_loss_falls_and_the_positive_rises(settings):
    values = settings(epochs=6, lr=3e-3)
    train(values)
    lines = read_metrics(Path(values["output_dir"]), "train")
    first, last = lines[0], lines[-1]
    assert last["loss"] < 0.7 * first["loss"] and last["positive_rank"] < first["positive_rank"]
    assert {"texts_per_second", "positive_cosine", "negative_cosine", "masked_negatives"} <= first.keys()


def test_a_finished_run_has_a_card_that_says_how_to_use_it(settings, tmp_path):
    values = settings(query_instruction="search: ")
    train(values)
    text = (Path(values["output_dir"]) / "model" / "README.md").read_text()
    assert 'Embedder("run")' in text and 'SentenceTransformer("run")' in text
    assert "pooling mean, at most 48 tokens per text and 24 per query" in text and "query: search: " in text
    assert "training: train.jsonl" in text and str(tmp_path) not in text


def test_a_run_that_changed_nothing_says_so(settings, caplog):
    caplog.set_level(logging.WARNING)
    train(settings(lr=1e-30))
    assert "the model did not change" in caplog.text
    caplog.clear()
    train(settings(overwrite_output_dir=True))
    assert "did not change" not in caplog.text


def test_a_model_that_opens_with_other_vectors_is_refused_before_the_first_step(settings, monkeypatch):
    save = EmbeddingModel.save_pretrained

    def forgetful(self, folder, state_dict=None):
        weights = {name: torch.zeros_like(value) for name, value in (state_dict or self.state_dict()).items()}
        save(self, folder, weights)

    monkeypatch.setattr(EmbeddingModel, "save_pretrained", forgetful)
    values = settings()
    with pytest.raises(StartError, match="saved and opened again, the model gives vectors that differ"):
        train(values)
    assert not Path(values["output_dir"], "run.json").exists()


def test_frozen_parts_do_not_change_and_all_others_do(settings, bert):
    values = settings(freeze_embeddings=True, freeze_layers=1)
    train(values)
    names = final_weights(values["output_dir"]).keys()
    frozen = {name for name in names if name.startswith(("embeddings", "encoder.layer.0.", "pooler"))}
    assert changed(bert, values) == names - frozen


def test_bitfit_changes_biases_alone(settings, bert):
    values = settings(fine_tune_type="bitfit")
    train(values)
    found = changed(bert, values)
    assert found and all(name.endswith(".bias") and not name.startswith("pooler") for name in found)


def test_lora_writes_an_adapter_and_a_merged_model(settings, bert):
    values = settings(lora_r=4, lora_target_modules="all-linear", lr=1e-2)
    train(values)
    folder = Path(values["output_dir"])
    assert list((folder / "adapter").glob("*.safetensors"))
    found = changed(bert, values)
    assert found and all(".dense." in name or ".attention.self." in name for name in found)


def test_kept_and_recomputed_graphs_give_the_same_bits_with_dropout(settings, tmp_path, bert_with_dropout):
    kept = settings(model_name_or_path=bert_with_dropout, max_tokens_per_batch=100)
    train(kept)
    for name, tokens in (("none", 0), ("half", 150)):
        other = kept | {"max_tokens_with_graph": tokens, "output_dir": str(tmp_path / name)}
        train(other)
        assert_same_bits(kept, other)


def test_dropout_differs_from_step_to_step_and_with_the_seed(settings, tmp_path, bert_with_dropout, bert):
    records = embedding_records(8)
    still = {"lr": 1e-30, "epochs": 2}
    losses = []
    for place, changes in enumerate(({"seed": 1}, {"seed": 2}, {"seed": 1}, {"model_name_or_path": bert})):
        values = settings(records, model_name_or_path=bert_with_dropout, **still, shuffle=False)
        values |= changes | {"output_dir": str(tmp_path / str(place))}
        train(values)
        losses += [[line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]]
    first, other, again, without = losses
    assert first[0] != first[1] and first != other and first == again
    assert without[0] == pytest.approx(without[1], rel=1e-6), "the same records"


def test_a_resumed_run_gives_the_same_bits(settings, tmp_path, bert_with_dropout):
    whole = settings(model_name_or_path=bert_with_dropout, epochs=2, save_steps=3, num_max_checkpoints=9)
    train(whole)
    checkpoint = str(Path(whole["output_dir"]) / "checkpoint-3")
    for name, changes in (("again", {}), ("workers", {"num_workers": 2}), ("graphs", {"max_tokens_with_graph": 0})):
        resumed = whole | changes | {"output_dir": str(tmp_path / name), "resume": checkpoint}
        train(resumed)
        assert_same_bits(whole, resumed)


def assert_same_bits(one: dict, two: dict) -> None:
    first, second = (final_weights(values["output_dir"]) for values in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_decoder_pools_its_last_token_and_keeps_its_prompt(settings, qwen2):
    values = settings(model_name_or_path=qwen2, query_instruction="Instruct: find\nQuery: ")
    train(values)
    model = EmbeddingModel.from_pretrained(Path(values["output_dir"]) / "model")
    assert model.settings.pooling == "last" and model.settings.prompts["query"] == "Instruct: find\nQuery: "


def test_a_loss_that_is_0_from_the_start_is_told_with_the_remedy(settings, caplog):
    caplog.set_level(logging.WARNING)
    train(settings([{"query": f"query {place}", "pos": [f"text {place}"]} for place in range(6)], batch_size=1))
    assert caplog.text.count("no query has a negative") == 1


def test_vectors_that_point_the_same_way_are_told_once(settings, caplog, monkeypatch):
    """What is told is of the losses: see tests/losses."""
    monkeypatch.setattr(task, "same_direction_problem", lambda sums: f"the same way, {sums['records']:.0f} records")
    caplog.set_level(logging.WARNING)
    train(settings(log_interval=2))
    assert caplog.text.count("the same way") == 1 and "the same way, 16 records" in caplog.text


def test_other_vectors_of_a_teacher_are_other_data(settings, tmp_path):
    texts = [{"query": f"text {place}"} for place in range(16)]
    file = tmp_path / "vectors.bin"
    np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32).tofile(file)
    values = settings(texts, loss_type="stella", train_dataset_vec=[str(file)], save_steps=1, teacher_embedding_dim=40)
    del values["temperature"]
    train(values)
    folder = Path(values["output_dir"])
    assert EmbeddingModel.from_pretrained(folder / "model").dim == 40
    np.random.default_rng(1).normal(size=(16, 40)).astype(np.float32).tofile(file)
    with pytest.raises(StartError, match="train_dataset: was .*content"):
        train(values | {"output_dir": str(tmp_path / "other"), "resume": str(folder / "checkpoint-1")})


def test_a_teacher_s_width_is_that_of_the_one_projection_whatever_the_matryoshka_widths(settings, tmp_path):
    texts = [{"query": f"text {place}"} for place in range(16)]
    np.random.default_rng(0).normal(size=(16, 48)).astype(np.float32).tofile(tmp_path / "vectors.bin")
    values = settings(texts, loss_type="stella", train_dataset_vec=[str(tmp_path / "vectors.bin")], use_mrl=True)
    values |= {"teacher_embedding_dim": 48, "mrl_dims": [16, 40]}  # the second is beyond the model's own 32
    del values["temperature"]
    train(values)
    model = EmbeddingModel.from_pretrained(Path(values["output_dir"]) / "model")
    assert [(head.in_features, head.out_features) for head in model.heads.values()] == [(32, 48)]
    assert model.settings.dims == (16, 40)
    with pytest.raises(ValueError, match=r"mrl_dims(.|\n)*64 is beyond the 48 numbers of a vector"):
        EmbeddingConfig(**values | {"mrl_dims": [16, 64]})


def test_graphs_are_kept_as_far_as_they_are_estimated_to_fit():
    """4 GiB over layers x 20 states x hidden size x bytes of a number; with checkpointing a layer keeps its input, and
    one at a time the rest."""
    model = SimpleNamespace(config=BertConfig(num_hidden_layers=6, hidden_size=384))
    for precision, checkpointed, states in (("no", False, 6 * 20), ("no", True, 6 + 20), ("bf16", False, 6 * 20 / 2)):
        accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
        assert graph_tokens(model, accelerator, checkpointed) == int(2**32 / (states * 384 * 4))
