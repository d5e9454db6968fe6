import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tiny_models import bert_tokenizer, bring_code, tiny_bert, tiny_qwen2
from transformers import AutoModel, AutoTokenizer

from rag_retrieval.retrieval.encoder import EncoderOptions, load_encoder

TEXTS = ["panda", "The giant panda is a bear and eats bamboo all day.", "猫", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("dense") / "bert")


@pytest.fixture(scope="module")
def sentence_folder(folder, tmp_path_factory):
    """A sentence-transformers folder with cls pooling and a prompt for queries."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(folder, max_seq_length=64)
    modules = [body, Pooling(body.get_embedding_dimension(), pooling_mode="cls")]
    path = tmp_path_factory.mktemp("dense") / "sentence"
    SentenceTransformer(modules=modules, prompts={"query": "query: ", "document": ""}, device="cpu").save(str(path))
    return str(path)


def load(model, **options):
    return load_encoder(EncoderOptions(model, **{"batch_size": 3, "similarity": "dot"} | options), "cpu")


@torch.inference_mode()
def one_by_one(folder, texts, pooling, max_len=512):
    """An independent slow way: each text alone, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_len, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state[0]
        vectors.append((hidden[0] if pooling == "cls" else hidden.mean(0)).numpy())
    return np.array(vectors)


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
def test_vectors_of_a_plain_folder_are_those_of_each_text_alone(folder, pooling):
    found = load(folder, pooling=pooling).documents(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(folder, TEXTS, pooling), atol=1e-5)


def test_prefixes_go_before_queries_and_documents(folder):
    encoder = load(folder, query_prefix="query: ", document_prefix="passage: ")
    queries = one_by_one(folder, [f"query: {text}" for text in TEXTS], "mean")
    documents = one_by_one(folder, [f"passage: {text}" for text in TEXTS], "mean")
    np.testing.assert_allclose(encoder.queries(TEXTS), queries, atol=1e-5)
    np.testing.assert_allclose(encoder.documents(TEXTS), documents, atol=1e-5)


def test_cosine_vectors_have_length_one(folder):
    lengths = np.linalg.norm(load(folder, similarity="cosine").documents(TEXTS), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_long_texts_are_cut_at_the_maximum(folder):
    long = "panda bear " * 400
    np.testing.assert_allclose(
        load(folder, max_len=6).documents([long]), one_by_one(folder, [long], "mean", max_len=6), atol=1e-5
    )
    assert load(folder).documents([long]).shape == (1, 32), "cut at the model's positions"
    with pytest.raises(ValueError, match="more than the 512 tokens"):
        load(folder, max_len=600)


def test_a_sentence_transformers_folder_pools_and_prompts_as_it_says(folder, sentence_folder):
    encoder = load(sentence_folder)
    queries = one_by_one(folder, [f"query: {text}" for text in TEXTS], "cls")
    np.testing.assert_allclose(encoder.queries(TEXTS), queries, atol=1e-5)
    np.testing.assert_allclose(encoder.documents(TEXTS), one_by_one(folder, TEXTS, "cls"), atol=1e-5)
    other = load(sentence_folder, query_prefix="ask: ").queries(TEXTS)
    np.testing.assert_allclose(other, one_by_one(folder, [f"ask: {text}" for text in TEXTS], "cls"), atol=1e-5)


def test_pooling_for_a_folder_that_has_its_own_is_a_mistake(sentence_folder):
    with pytest.raises(ValueError, match="pooling is given, but this sentence-transformers folder has its own"):
        load(sentence_folder, pooling="mean")


def test_a_folder_without_a_model_is_a_mistake(tmp_path):
    bert_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no config.json in it"):
        load(str(tmp_path))


def test_a_reranker_and_a_model_without_a_vocabulary_are_no_encoders(tmp_path):
    with pytest.raises(ValueError, match=r"is a reranker \(BertForSequenceClassification\); give a bi-encoder"):
        load(tiny_bert(tmp_path / "reranker", head_labels=1))
    folder = tiny_bert(tmp_path / "bare")
    for file in (tmp_path / "bare").glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="its tokenizer knows only special tokens"):
        load(folder)


def test_a_model_neither_local_nor_on_the_hub_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="^nobody/nothing: no such folder.*on the hub"):
        load("nobody/nothing")


def test_a_hub_that_cannot_say_how_a_model_pools_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--me--model" / "snapshots" / commit
    tiny_bert(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    with pytest.raises(ValueError, match="me/model: the hub cannot be reached.*modules.json"):
        load("me/model")


def test_code_of_a_model_runs_only_where_it_is_trusted(folder, tmp_path):
    own = bring_code(folder, tmp_path / "own")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(own)
    np.testing.assert_array_equal(load(own, trust_remote_code=True).documents(TEXTS), load(folder).documents(TEXTS))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_decoder_without_a_pad_token_encodes_empty_texts_as_zeros(tmp_path, batch_size):
    folder = tiny_qwen2(tmp_path / "decoder", pad_token=None)
    found = load(folder, batch_size=batch_size).documents(TEXTS)
    np.testing.assert_allclose(found[:3], one_by_one(folder, TEXTS[:3], "mean"), atol=1e-5)
    assert not found[3].any()
    assert not load(folder, pooling="cls", batch_size=batch_size).documents([""]).any()
