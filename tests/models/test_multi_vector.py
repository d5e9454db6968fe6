"""Token vectors: which tokens have one, query expansion, and the tokens of ColBERT's prompts."""

import logging

import numpy as np
import pytest
import torch
from embedder_samples import TEXTS
from tiny_models import bert_tokenizer

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.kept_tokens import cls_copies, kept_by_bge_m3, kept_by_colbert
from rag_retrieval.models.multi_vector import skiplist_ids, token_vectors
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import TokenBatch, make_batch


def batch_of(*texts: list[int], queries: int = 0) -> TokenBatch:
    return make_batch([
        EncodedPair(np.array(ids, np.int32), None, False, 0, place < queries) for place, ids in enumerate(texts)
    ])  # fmt: skip


def test_punctuation_is_left_out_of_documents_alone():
    batch = batch_of([1, 7, 8], [1, 7, 8, 7], queries=1)
    assert kept_by_colbert(batch, np.array([7, 50])).tolist() == [True, True, True, True, False, True, False]


def test_bge_m3_leaves_out_the_first_token_and_copies_of_cls():
    batch = batch_of([1, 5, 2], [1, 5, 6, 1, 7, 2], [1, 5, 6, 2])
    assert kept_by_bge_m3(batch, 1, cls_copies(batch, None, 1)).tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1]
    # with an interval of 3, the fourth token of the second text is a cls; that of the third text is its last, eos
    assert kept_by_bge_m3(batch, 1, cls_copies(batch, 3, 1)).tolist() == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1]


def test_vectors_have_length_1_and_their_texts_counts():
    states = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [0.0, 2.0]])
    found = token_vectors(states, torch.nn.Identity(), batch_of([1, 2], [1, 2]), np.array([True, False, True, True]))
    assert found.counts.tolist() == [1, 2]
    torch.testing.assert_close(found.vectors, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]]))


def test_words_that_are_not_one_token_stay(caplog):
    tokenizer = bert_tokenizer()
    with caplog.at_level(logging.WARNING):
        ids = skiplist_ids(tokenizer, [".", "zebra", "?"])
    assert ids.tolist() == tokenizer.convert_tokens_to_ids([".", "?"]) and "zebra" in caplog.text


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_new_token_vectors_are_those_of_colbert(base_folders, family):
    model = EmbeddingModel.from_pretrained(base_folders[family], representations=["multi_vector"], max_length=60).eval()
    tokenizer, encoder = model.tokenizer, model.text_encoder
    assert model.packs and model.settings.is_colbert and not model.settings.multi_vector_mean
    assert model.new_parameters == {"token_heads.multi_vector.0.weight"}
    assert model.settings.prompts == {"query": "[Q] ", "document": "[D] "}
    query = encoder.encode(["what is a panda?"], "query")[0]
    own = tokenizer("what is a panda?", add_special_tokens=False)["input_ids"]
    ids = [tokenizer.cls_token_id, tokenizer.convert_tokens_to_ids("[Q] "), *own, tokenizer.sep_token_id]
    assert query.ids.tolist() == ids + [tokenizer.mask_token_id] * (32 - len(ids))
    assert query.is_query and query.expansion == 32 - len(ids)
    assert not encoder.encode(["a"], "document")[0].is_query
    document = encoder.encode(["a panda."], "document")[0]
    with torch.no_grad():
        found = model(make_batch([query, document]))
    assert found.dense is None and found.lexical is None
    kept = [token for token in document.ids if token not in model.skiplist]
    assert len(kept) == len(document) - 1
    assert found.multi_vector.counts.tolist() == [32, len(kept)]
    assert found.multi_vector.vectors.shape == (32 + len(kept), 128)


def test_a_prompt_token_begins_as_the_mean_of_its_text(base_folders):
    plain = EmbeddingModel.from_pretrained(base_folders["bert"])
    rows = plain.model.get_input_embeddings().weight
    ids = plain.tokenizer("[Q] ", add_special_tokens=False)["input_ids"]
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=["multi_vector"])
    token = model.tokenizer.convert_tokens_to_ids("[Q] ")
    assert token == len(plain.tokenizer)
    torch.testing.assert_close(model.model.get_input_embeddings().weight[token], rows[ids].mean(0))


def test_prompts_that_are_given_take_the_place_of_colberts(base_folders):
    prompts = {"query": "find: ", "document": ""}
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=["multi_vector"], prompts=prompts)
    assert model.settings.prompts == prompts and len(model.tokenizer) == len(bert_tokenizer())


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "qwen2"])
def test_packed_token_vectors_are_those_of_padded_batches(base_folders, family, attend):
    options = {"attend_to_expansion_tokens": attend, "query_max_length": 24, "max_length": 60}
    model = EmbeddingModel.from_pretrained(base_folders[family], representations=["multi_vector"], **options).eval()
    assert model.packs
    batch = make_batch(model.text_encoder.encode(TEXTS, "query") + model.text_encoder.encode(TEXTS, "document"))
    with torch.no_grad():
        packed = model(batch).multi_vector
        model.packing_problem = "to compare with"
        padded = model(batch).multi_vector
    assert packed.counts.equal(padded.counts)
    torch.testing.assert_close(packed.vectors, padded.vectors, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attend", [False, True])
def test_whether_expansion_tokens_are_attended_to_changes_the_other_vectors(base_folders, attend):
    model = EmbeddingModel.from_pretrained(
        base_folders["bert"], representations=["multi_vector"], attend_to_expansion_tokens=attend, query_max_length=20
    ).eval()
    with torch.no_grad():
        expanded = model(make_batch(model.text_encoder.encode(["water boils"], "query"))).multi_vector.vectors
        plain = model(make_batch(model.text_encoder.encode(["water boils"], None, prompt="[Q] "))).multi_vector.vectors
    same = (expanded[: len(plain)] - plain).abs().max() < 1e-5
    assert len(expanded) == 20 > len(plain) and same != attend


def test_options_of_colbert_beside_other_representations_are_reported(base_folders, caplog):
    with caplog.at_level(logging.WARNING):
        model = EmbeddingModel.from_pretrained(
            base_folders["bert"], representations=["multi_vector", "dense"], query_expansion=True, colbert_dim=8
        )
    assert "query_expansion" in caplog.text and not model.settings.query_expansion
    assert model.settings.representations == ("dense", "multi_vector") and model.settings.multi_vector_mean
    assert model.new_parameters == {"token_heads.multi_vector.0.weight", "token_heads.multi_vector.0.bias"}


@pytest.mark.parametrize("names", [[], ["sparse"]])
def test_representations_that_are_not_known_are_refused(base_folders, names):
    with pytest.raises(ValueError, match="representations: expected one or more of dense, lexical, multi_vector"):
        EmbeddingModel.from_pretrained(base_folders["bert"], representations=names)


def test_copies_of_cls_have_no_part_in_the_other_representations(base_folders):
    options = {"pooling": "cls", "cls_interval": 6, "max_length": 40}
    splade = EmbeddingModel.from_pretrained(
        base_folders["bert"], representations=["dense", "lexical"], lexical="splade", **options
    ).eval()
    text = splade.text_encoder.encode([TEXTS[-1]])[0]
    with torch.no_grad():
        found = splade(make_batch([text])).lexical
        states = splade.model.base_model(torch.tensor(text.ids[None])).last_hidden_state[0]
        places = [place for place in range(len(text)) if place == 0 or place % 6 or place == len(text) - 1]
        logits = splade.model.get_output_embeddings()(splade.model.cls.predictions.transform(states[places]))
    expected = torch.log1p(torch.relu(logits.amax(0)))
    assert (text.ids[6], len(places)) == (text.ids[0], len(text) - 6)
    torch.testing.assert_close(torch.zeros_like(expected).index_put((found.ids,), found.weights), expected)
