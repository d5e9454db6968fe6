"""The model of a pre-training: layouts that agree, what a folder must have, and what is saved of it."""

import logging

import numpy as np
import pytest
import torch
from tiny_models import CHINESE, ENGLISH, bert_tokenizer, save_tiny, tiny_xlm_roberta
from transformers import AutoModelForMaskedLM, BertConfig

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.pretrain.model import DECODER_FILE, DecodingOptions, PretrainingModel
from rag_retrieval.train.pretrain.training_data import PretrainMicroBatch

TEXTS = [*ENGLISH[:4], *CHINESE[:3], "a"]
DECODING = DecodingOptions(0.5, 0.3)


def micro_batch(model: PretrainingModel, counted: bool = True) -> PretrainMicroBatch:
    texts = make_batch(model.text_encoder.encode(TEXTS))
    masked = np.arange(1, len(texts.ids), 5, dtype=np.int32)
    ids = texts.ids.copy()
    texts.ids[masked] = model.tokenizer.mask_token_id
    seeds, documents = np.arange(len(TEXTS)), np.arange(len(TEXTS), dtype=np.uint64)
    return PretrainMicroBatch(texts, ids, masked, seeds, documents, (0,) * 3, 0, [], counted)


@pytest.fixture(scope="module", params=["bert", "xlm_roberta", "modernbert"])
def folder(request, tmp_path_factory) -> str:
    if request.param == "xlm_roberta":
        return tiny_xlm_roberta(tmp_path_factory.mktemp(request.param))
    return request.getfixturevalue(request.param)


def test_packed_and_padded_batches_have_equal_losses_vectors_and_gradients(folder):
    found = []
    for attention in (None, "sdpa"):
        torch.manual_seed(3)  # of the new head and decoder
        model = PretrainingModel.from_pretrained(folder, 64, decoding=DECODING, attn_implementation=attention)
        assert model.packs == (attention is None), model.packing_problem
        sums, vectors = model(micro_batch(model))
        (sums.sum() + vectors.square().sum()).backward()
        found.append((sums, vectors, *(each.grad for _, each in sorted(model.named_parameters()))))
    assert len(found[0][0]) == 3 and (found[0][0] > 1).all()
    for packed, padded in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=2e-4, atol=2e-4)


def test_a_filler_s_losses_are_zero_with_a_gradient_of_zero_for_every_parameter(bert):
    model = PretrainingModel.from_pretrained(bert, 64, decoding=DECODING)
    model(micro_batch(model, counted=False)).sums.sum().backward()
    assert all(each.grad is not None and not each.grad.any() for each in model.parameters() if each.requires_grad)


def test_the_saved_folder_gives_an_embedder_the_vectors_of_pre_training(folder, tmp_path):
    for pooling in ("cls", "mean"):
        model = PretrainingModel.from_pretrained(folder, 64, pooling, DECODING).eval()
        model.save_pretrained(tmp_path / pooling)
        embedder = EmbeddingModel.from_pretrained(tmp_path / pooling).eval()
        assert (embedder.settings.pooling, embedder.settings.max_length) == (pooling, 64)
        batch = make_batch(model.text_encoder.encode(TEXTS))
        with torch.no_grad():
            ids = batch.ids
            own = PretrainMicroBatch(batch, ids, ids[:0], np.arange(len(TEXTS)), ids[:0], (), 0, [])
            found, expected = embedder(batch).dense, model(own, with_losses=False).vectors
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_keeps_the_head_and_the_decoder_for_a_run_that_goes_on(bert, tmp_path):
    first, other = (PretrainingModel.from_pretrained(bert, 64, decoding=DECODING) for _ in range(2))
    first.save_pretrained(tmp_path)
    assert (tmp_path / DECODER_FILE).is_file() and not torch.equal(first.decoder.key.weight, other.decoder.key.weight)
    other.load_heads(tmp_path)
    assert torch.equal(first.decoder.key.weight, other.decoder.key.weight)
    again = PretrainingModel.from_pretrained(str(tmp_path), 64, decoding=DECODING)
    dense = "cls.predictions.transform.dense.weight"
    assert torch.equal(first.model.get_parameter(dense), again.model.get_parameter(dense))
    assert {name.split(".")[0] for name in again.new_parameters} == {"decoder"}
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.architectures == ["BertForMaskedLM"]


def test_what_does_not_fit_is_an_error_with_the_remedy(bert, base_folders, tmp_path):
    with pytest.raises(ValueError, match="max_len 513 is more than the 512 tokens"):
        PretrainingModel.from_pretrained(bert, 513)
    with pytest.raises(ValueError, match="is a qwen2; expected an encoder"):
        PretrainingModel.from_pretrained(base_folders["qwen2"], 64)
    tokenizer = bert_tokenizer()
    tokenizer.mask_token = None
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    save_tiny(tmp_path, config, tokenizer)
    with pytest.raises(ValueError, match="no mask token"):
        PretrainingModel.from_pretrained(str(tmp_path), 64)


def test_what_an_embedder_has_beyond_the_encoder_is_named_as_not_kept(bert, tmp_path, caplog):
    options = {"prompts": {"query": "query: "}, "dims": (16, 48), "representations": ["dense", "lexical"]}
    EmbeddingModel.from_pretrained(bert, **options).save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING)
    PretrainingModel.from_pretrained(str(tmp_path), 64)
    assert "not kept" in caplog.text and "prompts, 2_Dense, sparse_linear.pt" in caplog.text
