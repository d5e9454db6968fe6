"""Heads of representations that a folder has or gets: new, trained, saved, and asked for in vain."""


import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from embedder_samples import TEXTS, assert_equal_elsewhere
from tiny_models import tiny_bert

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.representations import REPRESENTATIONS, Representations
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.lora import SavedModel, add_lora

THREE = {"representations": REPRESENTATIONS, "colbert_dim": 8}
SPLADE = {"representations": ["dense", "lexical"], "lexical": "splade"}


def tensors_of(model: EmbeddingModel, texts=TEXTS) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model.eval()(make_batch(model.text_encoder.encode(texts, "document")))
    return flat(found)


def flat(found: Representations) -> list[torch.Tensor]:
    parts = ([found.dense], found.lexical or [], found.multi_vector or [])
    return [tensor for part in parts for tensor in part if tensor is not None]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 0.0) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


def train_a_step(model: EmbeddingModel) -> None:
    """All parameters that are trained get a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = flat(model.train()(make_batch(model.text_encoder.encode(TEXTS[:6]))))
    sum((each * torch.linspace(0, 1, each.shape[-1])).sum() for each in found if each.is_floating_point()).backward()
    missing = {name for name, each in model.named_parameters() if each.requires_grad and each.grad is None}
    assert not {name for name in missing if "pooler" not in name}
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (THREE, {"sparse_linear.pt", "colbert_linear.pt"}),
        ({"representations": ["lexical"]}, {"sparse_linear.pt", "embedder_config.json"}),
        ({"representations": ["dense", "multi_vector"], "cls_interval": 8, "pooling": "cls"}, {"colbert_linear.pt"}),
        (SPLADE, {"embedder_config.json"}),
    ],
)
def test_new_heads_are_trained_and_saved(base_folders, tmp_path, options, files):
    torch.manual_seed(1)
    model = EmbeddingModel.from_pretrained(base_folders["bert"], max_length=40, **options)
    own = {name for name in model.new_parameters if not name.startswith("cls.")}
    assert own == {name for name, _ in model.named_parameters() if name.startswith("token_heads.")}
    train_a_step(model)
    trained = tensors_of(model)
    model.save_pretrained(tmp_path)
    assert files <= {file.name for file in tmp_path.iterdir()}
    again = open_embedder(tmp_path)
    assert again.settings == model.settings and not again.new_parameters
    assert_same(tensors_of(again), trained, 1e-5)
    if "dense" in model.settings.representations and not model.settings.cls_interval:
        assert_equal_elsewhere(model, tmp_path, TEXTS[:4])  # as a SentenceTransformer


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_decoder_has_all_three(base_folders, family):
    model = EmbeddingModel.from_pretrained(base_folders[family], **THREE).eval()
    assert model.packs and not model.shares_queries
    packed = tensors_of(model)
    model.packing_problem = "to compare with"
    assert_same(tensors_of(model), packed, 2e-5)
    batch = make_batch(model.text_encoder.encode(TEXTS))
    tokens = batch.lengths - len(model.text_encoder.template.prefix)  # bos has no vector
    with torch.no_grad():
        assert model(batch).multi_vector.counts.tolist() == tokens.tolist()


@pytest.mark.parametrize(("options", "lora"), [(THREE, False), (THREE, True), (SPLADE, False)])
def test_what_a_run_saves_holds_all_heads(base_folders, tmp_path, options, lora):
    def base() -> EmbeddingModel:
        torch.manual_seed(1)
        return EmbeddingModel.from_pretrained(base_folders["bert"], max_length=40, **options)

    model = base()
    config = SimpleNamespace(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="all-linear")
    adapter = add_lora(model.model, model.new_parameters, config) if lora else None
    saved = SavedModel(model, base, adapter)
    train_a_step(model)
    trained = tensors_of(model)
    (tmp_path / "checkpoint").mkdir()
    saved.save_model(tmp_path / "checkpoint", model.state_dict())
    train_a_step(model)
    saved.load_model(tmp_path / "checkpoint")
    assert_same(tensors_of(model), trained, 1e-5)
    (tmp_path / "results").mkdir()
    saved.export(tmp_path / "checkpoint", tmp_path / "results")
    assert_same(tensors_of(open_embedder(tmp_path / "results" / "model")), trained, 1e-5)


def test_representations_can_be_left_out_of_a_folder_that_has_them(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], **THREE).save_pretrained(tmp_path / "three")
    model = EmbeddingModel.from_pretrained(tmp_path / "three", representations=["dense"])
    assert not model.token_heads and not model.new_parameters
    model.save_pretrained(tmp_path / "three")  # over it
    assert open_embedder(tmp_path / "three").settings.representations == ("dense",)


def test_another_width_than_the_folders_is_refused(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], **THREE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8 numbers, and colbert_dim is 16"):
        EmbeddingModel.from_pretrained(tmp_path, colbert_dim=16)
    assert EmbeddingModel.from_pretrained(tmp_path, colbert_dim=8).settings.representations == REPRESENTATIONS


@pytest.mark.parametrize("representations", [["lexical"], ["dense", "lexical"]])
def test_a_folder_without_the_head_that_it_names_is_refused(base_folders, tmp_path, representations):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=representations)
    model.save_pretrained(tmp_path)
    (tmp_path / "sparse_linear.pt").unlink()
    with pytest.raises(ValueError, match="lacks the weights of lexical"):
        open_embedder(tmp_path)


def test_files_that_hold_more_than_weights_are_refused(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], **THREE).save_pretrained(tmp_path)
    torch.save({"weight": Path("a")}, tmp_path / "sparse_linear.pt")  # unpickling it would run code
    with pytest.raises(ValueError, match="sparse_linear.pt cannot be loaded .*more than weights") as raised:
        open_embedder(tmp_path)
    assert "weights_only" not in str(raised.value)  # torch's text says how to run the code


@pytest.mark.parametrize(
    ("file", "shape", "expected"),
    [
        ("sparse_linear.pt", (1, 16), "weights of lexical take 16 numbers, and are given 32"),
        ("sparse_linear.pt", (2, 32), "weights of lexical give 2 numbers for a token, expected 1"),
        ("colbert_linear.pt", (8, 16), "weights of multi_vector take 16 numbers, and are given 32"),
    ],
)
def test_heads_of_another_model_are_refused(base_folders, tmp_path, file, shape, expected):
    EmbeddingModel.from_pretrained(base_folders["bert"], **THREE).save_pretrained(tmp_path)
    torch.save({"weight": torch.ones(shape)}, tmp_path / file)
    with pytest.raises(ValueError, match=expected):
        open_embedder(tmp_path)


def test_a_length_that_is_given_is_not_said_to_differ_from_a_new_ones(base_folders, caplog):
    caplog.set_level(logging.INFO)
    options = {"representations": ["multi_vector"], "query_max_length": 24}
    model = EmbeddingModel.from_pretrained(base_folders["bert"], **options)
    assert model.settings.max_lengths["query"] == model.text_encoder.template.expanded_length == 24
    assert "saved with" not in caplog.text


def test_representations_of_a_file_that_are_no_names_are_refused(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], **THREE).save_pretrained(tmp_path)
    (tmp_path / "embedder_config.json").write_text('{"representations": [{}, 1]}')
    with pytest.raises(ValueError, match="representations: expected one or more of dense, lexical, multi_vector"):
        open_embedder(tmp_path)


def test_a_language_modelling_head_that_is_no_number_is_named(base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], **SPLADE)
    torch.nn.init.constant_(model.model.cls.predictions.transform.dense.weight, torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cls.predictions.transform.dense.weight are not all finite"):
        open_embedder(tmp_path)


def test_flag_embeddings_own_folder_is_pooled_by_cls(base_folders, tmp_path):
    folder = tiny_bert(tmp_path)  # without any file of sentence-transformers
    torch.save(torch.nn.Linear(32, 1).state_dict(), tmp_path / "sparse_linear.pt")
    settings = open_embedder(folder).settings
    assert (settings.pooling, settings.representations) == ("cls", ("dense", "lexical"))


def test_splade_of_a_folder_without_a_language_modelling_head_is_new(base_folders, caplog):
    with caplog.at_level(logging.WARNING):
        model = EmbeddingModel.from_pretrained(base_folders["bert"], **SPLADE)
    assert "cls.predictions" in caplog.text and any(name.startswith("cls.") for name in model.new_parameters)
    decoder = EmbeddingModel.from_pretrained(base_folders["qwen2"], **SPLADE)
    assert not decoder.new_parameters and decoder.causal


def test_a_pooling_that_is_given_to_a_base_model_is_not_said_to_differ(base_folders, caplog):
    with caplog.at_level(logging.WARNING):
        EmbeddingModel.from_pretrained(base_folders["bert"], pooling="cls")
    assert "pooling" not in caplog.text
