"""The dense model of mining: an index with the options that mining has."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_bert
from transformers import AutoModel, AutoTokenizer

from rag_retrieval.mining.config import MiningConfig
from rag_retrieval.mining.run import index_options
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.encoding import encode_with, open_embedder
from rag_retrieval.retrieval.index_files import fingerprint

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


def options_of(model, **options):
    keys = {"dense_batch_size": 3, "similarity": "dot"} | options
    return index_options(MiningConfig(data="d", output="o.jsonl", candidates="dense", dense_model=model, **keys))


def load(model, **options):
    """(encode queries, encode documents)"""
    options = options_of(model, device="cpu", **options)
    embedder = open_embedder(options)
    return encode_with(embedder, "query", options), encode_with(embedder, "document", options)


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


def directions(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
def test_vectors_of_a_plain_folder_are_those_of_each_text_alone(folder, pooling):
    found = load(folder, pooling=pooling)[1](TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(folder, TEXTS, pooling), atol=1e-5)


def test_prefixes_go_before_queries_and_documents(folder):
    both = load(folder, query_prefix="query: ", document_prefix="passage: ", similarity="cosine")
    for encode, prefix in zip(both, ("query: ", "passage: "), strict=True):
        expected = directions(one_by_one(folder, [prefix + text for text in TEXTS], "mean"))
        np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-5)


def test_long_texts_are_cut_at_the_maximum(folder):
    long = "panda bear " * 400
    found = load(folder, dense_max_len=6, similarity="cosine")[1]([long])
    np.testing.assert_allclose(found, directions(one_by_one(folder, [long], "mean", max_len=6)), atol=1e-5)
    with pytest.raises(ValueError, match="more than the 512 tokens"):
        load(folder, dense_max_len=600)


def test_a_sentence_transformers_folder_pools_and_prompts_as_it_says(folder, sentence_folder):
    """Without its library; its vectors have the length that it gives them, unless angles are compared."""
    encode_queries, encode_documents = load(sentence_folder)
    queries = one_by_one(folder, [f"query: {text}" for text in TEXTS], "cls")
    np.testing.assert_allclose(encode_queries(TEXTS), queries, atol=2e-5)
    np.testing.assert_allclose(encode_documents(TEXTS), one_by_one(folder, TEXTS, "cls"), atol=2e-5)
    other = load(sentence_folder, query_prefix="ask: ")[0](TEXTS)
    np.testing.assert_allclose(other, one_by_one(folder, [f"ask: {text}" for text in TEXTS], "cls"), atol=2e-5)
    lengths = np.linalg.norm(load(sentence_folder, similarity="cosine")[1](TEXTS), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_an_index_compares_as_the_model_says(sentence_folder, tmp_path):
    """Its folder has no Normalize: cosines need vectors of length 1, inner products those that it gives."""
    lengths = {}
    for similarity in ("cosine", "dot", "euclidean"):
        copied = Path(shutil.copytree(sentence_folder, tmp_path / similarity))
        file = copied / "config_sentence_transformers.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"similarity_fn_name": similarity}))
        options = IndexOptions(embedder=str(copied), device="cpu")
        if similarity == "euclidean":
            with pytest.raises(ValueError, match="compares vectors by the euclidean distance, and an index by their"):
                encode_with(open_embedder(options), "document", options)
        else:
            vectors = encode_with(open_embedder(options), "document", options)(TEXTS)
            lengths[similarity] = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths["cosine"], 1, atol=1e-6)
    assert abs(lengths["dot"] - 1).max() > 0.1


def test_a_reranker_is_no_dense_model(tmp_path):
    with pytest.raises(ValueError, match="reranker"):
        load(tiny_bert(tmp_path / "reranker", head_labels=1))


def test_what_decides_on_the_vectors_names_them(folder, sentence_folder):
    first = fingerprint(options_of(folder, query_prefix="query: "))
    for changes in ({"document_prefix": "p: "}, {"pooling": "cls"}, {"dense_max_len": 9}, {"similarity": "cosine"}):
        assert fingerprint(options_of(folder, query_prefix="query: ", **changes)) != first
    assert fingerprint(options_of(sentence_folder, query_prefix="query: ")) != first
