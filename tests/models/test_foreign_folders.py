"""Folders that sentence-transformers and transformers wrote with settings that are not their defaults: equal scores."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from tiny_models import ENGLISH, bert_tokenizer, save_tiny, tiny_bert, tiny_qwen2, tiny_xlm_roberta
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from rag_retrieval import CrossEncoder, Reranker, load_reranker

LONG = " ".join(ENGLISH)
PAIRS = [("where is Paris?", LONG), ("water", ENGLISH[6]), ("how do I open a file?", LONG + LONG)]
FORMATS = dict(query_format="Q: {}", document_format="D: {}", seq="\n", special_token=" ?")


def theirs(folder, save: Path | None = None, **options) -> np.ndarray:
    """Raw scores of sentence-transformers, which writes the folder `save` where one is named."""
    model = TheirCrossEncoder(str(folder), device="cpu", **options)
    if save is not None:
        model.save_pretrained(str(save))
    return model.predict(PAIRS, activation_fn=torch.nn.Identity(), batch_size=1)


def ours(folder, **options) -> np.ndarray:
    return Reranker(folder, device="cpu", **options).compute_score(PAIRS)


@pytest.mark.parametrize("make", [tiny_bert, tiny_xlm_roberta])
def test_the_length_that_sentence_transformers_trained_with_holds(make, tmp_path, caplog):
    make(tmp_path / "base", head_labels=1)
    expected = theirs(tmp_path / "base", tmp_path / "saved", max_length=48)
    with caplog.at_level(logging.INFO):
        np.testing.assert_allclose(ours(tmp_path / "saved"), expected, atol=1e-5)
    assert "at most 48 tokens (model_max_length of its tokenizer)" in caplog.text
    assert np.abs(ours(tmp_path / "saved", max_length=512) - expected).max() > 0.01
    scorer = CrossEncoder.from_pretrained(tmp_path / "saved")
    assert scorer.pair_encoder.max_length == 48
    np.testing.assert_allclose(scorer.compute_score(PAIRS), expected, atol=1e-5)


def test_max_seq_length_of_older_versions_holds_over_the_tokenizer_s(tmp_path, caplog):
    folder = Path(tiny_bert(tmp_path, head_labels=1))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": false}')
    with caplog.at_level(logging.INFO):
        np.testing.assert_allclose(ours(folder), theirs(folder, max_length=40), atol=1e-5)
    assert "at most 40 tokens (max_seq_length of sentence_bert_config.json)" in caplog.text


def test_a_limit_beyond_the_positions_is_cut_to_them_and_no_number_is_no_limit(tmp_path):
    folder = Path(tiny_bert(tmp_path, head_labels=1))
    for limit, expected in ((10**30, 512), (2000, 512), (100, 100), (0, 512)):
        change(folder / "tokenizer_config.json", model_max_length=limit)
        assert Reranker(folder, device="cpu").max_length == expected


def test_a_language_model_s_context_is_no_default_length(tmp_path):
    folder = Path(tiny_qwen2(tmp_path, head_labels=1))
    change(folder / "config.json", max_position_embeddings=32_768)
    assert load_reranker(folder, device="cpu", **FORMATS).pair_encoder.max_length == 8192
    change(folder / "tokenizer_config.json", model_max_length=96)
    assert load_reranker(folder, device="cpu", **FORMATS).pair_encoder.max_length == 96


def test_a_default_prompt_goes_before_the_query(tmp_path):
    tiny_bert(tmp_path / "base", head_labels=1)
    prompts = dict(prompts={"search": "a file in Python: "}, default_prompt_name="search")
    expected = theirs(tmp_path / "base", tmp_path / "saved", **prompts)
    np.testing.assert_allclose(ours(tmp_path / "saved"), expected, atol=1e-5)
    assert np.abs(ours(tmp_path / "saved", query_format="{}") - expected).max() > 0.01


def test_do_lower_case_of_sentence_transformers_holds_and_is_saved(tmp_path):
    tokenizer = bert_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None  # a cased one
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    folder = Path(save_tiny(tmp_path / "base", config, tokenizer, head_labels=1))
    cased = ours(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 100, "do_lower_case": true}')
    (folder / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]'
    )
    expected = ours(folder)
    lowered = [(query.lower(), document.lower()) for query, document in PAIRS]
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 100, "do_lower_case": false}')
    np.testing.assert_allclose(Reranker(folder, device="cpu").compute_score(lowered), expected, atol=1e-5)
    assert np.abs(cased - expected).max() > 0.01
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 100, "do_lower_case": true}')
    load_reranker(folder, device="cpu").save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(ours(tmp_path / "saved"), expected, atol=1e-5)


def test_an_activation_changes_no_score_since_scores_are_logits(tmp_path):
    tiny_bert(tmp_path / "base", head_labels=1)
    expected = theirs(tmp_path / "base", tmp_path / "saved", activation_fn=torch.nn.Tanh())
    np.testing.assert_allclose(ours(tmp_path / "saved"), expected, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_bert, tiny_xlm_roberta])
def test_documents_lose_their_beginning_where_the_tokenizer_says_so(make, tmp_path):
    folder = Path(make(tmp_path / "base", head_labels=1))
    from_the_right = ours(folder, max_length=48)
    change(folder / "tokenizer_config.json", truncation_side="left", model_max_length=48)
    expected = theirs(folder)
    np.testing.assert_allclose(ours(folder), expected, atol=1e-5)
    assert np.abs(from_the_right - expected).max() > 0.01
    load_reranker(folder, device="cpu").save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(ours(tmp_path / "saved"), expected, atol=1e-5)


def test_a_new_head_reads_the_beginning_whatever_the_base_said(tmp_path):
    folder = Path(tiny_bert(tmp_path / "base"))
    change(folder / "tokenizer_config.json", truncation_side="left", model_max_length=48)
    scorer = CrossEncoder.from_pretrained(folder)
    assert scorer.pair_encoder.max_length == 512 and not scorer.pair_encoder.template.truncate_left
    scorer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").truncation_side == "right"


def test_padding_at_the_left_changes_no_score(tmp_path):
    folder = Path(tiny_bert(tmp_path, head_labels=1))
    expected = ours(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.save_pretrained(folder)
    np.testing.assert_allclose(ours(folder), expected, atol=1e-6)


def test_weights_in_half_precision_are_read_into_float32(tmp_path):
    folder = tiny_bert(tmp_path, head_labels=1, dtype=torch.bfloat16)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [model(**tokenizer(*pair, truncation=True, max_length=512, return_tensors="pt")).logits.item()
                    for pair in PAIRS]  # fmt: skip
    np.testing.assert_allclose(ours(folder), expected, atol=1e-5)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
