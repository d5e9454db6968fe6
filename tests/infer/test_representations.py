"""`Embedder` and `Reranker` over folders with lexical weights and token vectors, beside slow loops over the states of
transformers, and beside sentence-transformers."""

import logging
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_models import CHINESE, ENGLISH, HIDDEN, tiny_bert, tiny_xlm_roberta
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from rag_retrieval import ColBERT, Embedder, Reranker
from rag_retrieval.models.embedder import EmbeddingModel

QUERIES = ["The capital of France, and the river that runs through it?", "水在多少度沸腾?", "fever"]
DOCUMENTS = [*ENGLISH, *CHINESE, "", "Paris!", " ".join(ENGLISH)]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
ALL = ("dense", "lexical", "multi_vector")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "embedding.md"
WIDTH = 24  # of bge-m3's token vectors here


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Read only. m3: bge-m3's layout. colbert: PyLate's. splade: a SparseEncoder. dense: of one vector alone."""
    path = tmp_path_factory.mktemp("representations")
    base = tiny_xlm_roberta(path / "base")
    body = Transformer(base, max_seq_length=64)
    modules = [body, Pooling(body.get_embedding_dimension(), pooling_mode="cls"), Normalize()]
    for name in ("m3", "dense"):
        SentenceTransformer(modules=modules, device="cpu").save(str(path / name))
    torch.manual_seed(0)
    for file, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", WIDTH)):
        state = torch.nn.Linear(HIDDEN, width).state_dict()
        state["bias"] += width == 1  # else most lexical weights would be 0
        torch.save(state, path / "m3" / file)
    options = {"representations": ["multi_vector"], "colbert_dim": 16, "query_max_length": 20, "max_length": 48}
    EmbeddingModel.from_pretrained(tiny_bert(path / "bert"), **options).save_pretrained(path / "colbert")
    splade = EmbeddingModel.from_pretrained(path / "bert", representations=["lexical"], lexical="splade", max_length=48)
    splade.save_pretrained(path / "splade")
    return {name: str(path / name) for name in ("m3", "colbert", "splade", "dense")}


@pytest.fixture(scope="module")
def m3(folders) -> Embedder:
    return Embedder(folders["m3"], device="cpu")


@cache
def slow_m3(folder: str, text: str) -> tuple[np.ndarray, dict[int, float], np.ndarray]:
    """By BGE-M3's formulas, one text at a time: the dense vector, the weight of each token id, the token vectors."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sparse, colbert = (torch.load(f"{folder}/{name}_linear.pt") for name in ("sparse", "colbert"))
    inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    token_weights = (states @ sparse["weight"].T + sparse["bias"]).relu()[:, 0].tolist()
    weights = {}
    for token, weight in zip(inputs["input_ids"][0].tolist(), token_weights, strict=True):
        if token not in tokenizer.all_special_ids and weight > 0:
            weights[token] = max(weight, weights.get(token, 0))
    vectors = normalize(states[1:] @ colbert["weight"].T + colbert["bias"], dim=-1)
    return normalize(states[0], dim=-1).numpy(), weights, vectors.numpy()


def slow_scores(folder: str, pair: tuple[str, str]) -> list[float]:
    (q_dense, q_weights, q_vectors), (d_dense, d_weights, d_vectors) = (slow_m3(folder, text) for text in pair)
    lexical = sum(q_weights[token] * d_weights[token] for token in q_weights if token in d_weights)
    best = [max(float(left @ right) for right in d_vectors) for left in q_vectors]
    return [float(q_dense @ d_dense), lexical, sum(best) / len(best)]


# ---- encode ---------------------------------------------------------------------------------------------


def test_encode_gives_every_representation_of_bge_m3(folders, m3):
    found = m3.encode(DOCUMENTS, outputs=ALL)
    assert found.dense.shape == (len(DOCUMENTS), HIDDEN) and len(found.lexical) == len(found.multi_vector)
    tokenizer = AutoTokenizer.from_pretrained(folders["m3"])
    for place, text in enumerate(DOCUMENTS):
        dense, weights, vectors = slow_m3(folders["m3"], text)
        np.testing.assert_allclose(found.dense[place], dense, atol=1e-5)
        assert found.lexical.by_id(place) == pytest.approx(weights, abs=1e-5)
        names = [token.removeprefix("▁") for token in tokenizer.convert_ids_to_tokens(weights)]
        assert {name.removeprefix("▁") for name in found.lexical[place]} == set(names)
        np.testing.assert_allclose(found.multi_vector[place], vectors, atol=1e-5)
        assert found.multi_vector[place].dtype == np.float32


def test_splade_gives_the_tokens_and_weights_of_sentence_transformers(folders):
    embedder, other = Embedder(folders["splade"], device="cpu"), SparseEncoder(folders["splade"], device="cpu")
    found = embedder.encode_documents(DOCUMENTS[:4], outputs=["lexical"]).lexical
    for mine, theirs in zip(found, other.decode(other.encode_document(DOCUMENTS[:4])), strict=True):
        assert mine == pytest.approx(dict(theirs), abs=1e-4) and len(mine) > 20
    queries = embedder.compute_score(PAIRS[:4]).lexical
    expected = other.similarity(other.encode_query([QUERIES[0]]), other.encode_document(DOCUMENTS[:4])).to_dense()
    np.testing.assert_allclose(queries, expected.numpy()[0], rtol=1e-4)
    with pytest.raises(ValueError, match="outputs: .* gives lexical, and 'dense' was asked for; name some of these"):
        embedder.encode("water")


def test_outputs_are_given_alone_and_in_their_places(m3):
    whole = m3.encode(DOCUMENTS, outputs=ALL)
    np.testing.assert_allclose(m3.encode(DOCUMENTS), whole.dense, atol=1e-5)
    alone = m3.encode(DOCUMENTS, outputs=["lexical"])
    assert alone.dense is None and alone.multi_vector is None
    assert [dict(text) for text in alone.lexical] == [pytest.approx(text, abs=1e-5) for text in whole.lexical]
    one = m3.encode(DOCUMENTS[0], outputs=("multi_vector", "dense"))
    np.testing.assert_allclose(one.dense, whole.dense[0], atol=1e-5)
    np.testing.assert_allclose(one.multi_vector, whole.multi_vector[0], atol=1e-5)
    none = m3.encode([], outputs=ALL)
    assert none.dense.shape == (0, HIDDEN) and len(none.lexical) == len(none.multi_vector) == 0


def test_only_what_is_asked_for_is_computed(m3):
    asked = []
    hook = m3.model.register_forward_hook(lambda module, arguments, given: asked.append(given))
    m3.encode(["water"], outputs=["lexical"])
    m3.encode(["water"])
    hook.remove()
    assert [[part is not None for part in given] for given in asked] == [[False, True, False], [True, False, False]]


def test_token_vectors_come_in_halves_and_pooled(m3):
    whole = m3.encode_documents(DOCUMENTS, outputs=["multi_vector"]).multi_vector
    half = m3.encode_documents(DOCUMENTS, outputs=ALL, precision="float16", pool_factor=2)
    assert half.dense.dtype == half.multi_vector[0].dtype == np.float16
    assert [len(vectors) for vectors in half.multi_vector] == [max(len(vectors) // 2, 1) for vectors in whole]
    np.testing.assert_allclose(np.linalg.norm(half.multi_vector[0].astype(np.float32), axis=1), 1, atol=1e-3)
    for wrong in (0.5, True, "2"):
        with pytest.raises(ValueError, match="pool_factor must be a number of at least 1"):
            m3.encode_documents(DOCUMENTS, outputs=ALL, pool_factor=wrong)
    with pytest.raises(ValueError, match="pool_factor is for documents"):
        m3.encode(QUERIES, kind="query", outputs=ALL, pool_factor=2)


def test_colbert_documents_are_pooled_as_by_sentence_transformers(folders):
    pooling = HierarchicalTokenPooling(2)  # its first vector, of cls, stays
    expected = MultiVectorEncoder(folders["colbert"], device="cpu").encode_document(DOCUMENTS, token_pooling=pooling)
    embedder = Embedder(folders["colbert"], device="cpu")
    found = embedder.encode_documents(DOCUMENTS, outputs=["multi_vector"], pool_factor=2).multi_vector
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_an_option_of_what_is_not_asked_for_is_a_warning(m3, caplog):
    caplog.set_level(logging.WARNING, logger="rag_retrieval")
    m3.encode(["water"], outputs=["lexical"], pool_factor=2)
    assert "pool_factor" in caplog.text and "ignored" in caplog.text


@pytest.mark.parametrize("outputs", [["colbert"], ["dense", "lexical"], [], "dense"])
def test_outputs_that_a_model_does_not_give_are_refused(folders, outputs):
    with pytest.raises(ValueError, match="outputs: "):
        Embedder(folders["dense"], device="cpu").encode(["water"], outputs=outputs)


def test_two_devices_give_the_representations_of_one(folders, m3):
    found = Embedder(folders["m3"], devices=["cpu", "cpu"]).encode(DOCUMENTS, outputs=ALL, batch_size=2)
    expected = m3.encode(DOCUMENTS, outputs=ALL)
    np.testing.assert_array_equal(found.lexical.ids, expected.lexical.ids)
    for mine, theirs in zip(found.multi_vector, expected.multi_vector, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


# ---- scores of pairs ------------------------------------------------------------------------------------


def test_pairs_are_scored_in_every_way_and_mixed(folders, m3):
    pairs = PAIRS[:: len(PAIRS) // 8]
    found = m3.compute_score(pairs)
    expected = np.array([slow_scores(folders["m3"], pair) for pair in pairs])
    for place, name in enumerate(ALL):
        np.testing.assert_allclose(getattr(found, name), expected[:, place], atol=1e-4)
    np.testing.assert_allclose(found.ensemble, expected @ [1, 0.3, 1], atol=1e-4)
    assert (expected[:, 1] > 0).any() and (expected[:, 1] == 0).any()
    mixed = m3.compute_score(pairs, weights=[0.5, 0, 2]).ensemble
    np.testing.assert_allclose(mixed, expected @ [0.5, 0, 2], atol=1e-4)
    lexical = m3.compute_score(pairs, {"lexical": 3}, outputs=["lexical"])
    np.testing.assert_allclose(lexical.ensemble, 3 * expected[:, 1], atol=1e-4)
    assert lexical.dense is None


def test_parts_of_a_long_list_of_pairs_are_joined(m3, monkeypatch):
    expected = m3.compute_score(PAIRS)
    monkeypatch.setattr("rag_retrieval.infer.embedder.SCORED_PAIRS", 7)
    found = m3.compute_score(PAIRS)
    for name in (*ALL, "ensemble"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    assert m3.compute_score([]).ensemble.shape == (0,)
    assert m3.compute_score(list(PAIRS[0])).dense.shape == (1,)


@pytest.mark.parametrize(
    "weights,message",
    [([1, 2], "one for each of dense, lexical"), ({"sparse": 1}, "'sparse' is not known"), ([1, "a", 1], "'a'"),
     ([1, True, 1], "lexical must be a number"), ([1, float("nan"), 0], "lexical must be a number"),
     (5, "expected a list, found int")],
)  # fmt: skip
def test_weights_that_mean_nothing_are_refused(m3, weights, message):
    with pytest.raises(ValueError, match=f"weights: .*{message}"):
        m3.compute_score(PAIRS[:1], weights)


def test_a_weight_of_what_the_model_lacks_is_refused(folders):
    dense = Embedder(folders["dense"], device="cpu")
    with pytest.raises(ValueError, match="weights: this model gives dense and no lexical"):
        dense.compute_score(PAIRS[:1], [1, 0.3, 1])
    scores = dense.compute_score(PAIRS[:2], [2, 0, 0])
    assert scores.lexical is None and scores.multi_vector is None
    np.testing.assert_allclose(scores.ensemble, 2 * scores.dense)


# ---- explain --------------------------------------------------------------------------------------------


def test_an_explanation_adds_up_to_the_scores(m3):
    query, document = "Water boils at sea level", DOCUMENTS[6]
    found = m3.explain(query, document)
    scores = m3.compute_score([(query, document)])
    assert found.similarity.shape == (len(found.query_tokens), len(found.document_tokens))
    assert found.similarity.max(axis=1).mean() == pytest.approx(scores.multi_vector[0], abs=1e-5)
    assert sum(q * d for q, d in found.common.values()) == pytest.approx(scores.lexical[0], abs=1e-5)
    assert found.scores.ensemble[0] == pytest.approx(scores.ensemble[0], abs=1e-5)
    assert "".join(found.query_tokens).replace("▁", "") == "Waterboilsatsealevel</s>"


def test_an_explanation_of_colbert_names_its_mask_tokens_and_no_punctuation(folders):
    found = Embedder(folders["colbert"], device="cpu").explain("fever", "Fever, cough and tiredness.")
    assert found.query_tokens.count("[MASK]") > 5 and len(found.query_tokens) == 20
    assert {",", "."}.isdisjoint(found.document_tokens) and "[MASK]" not in found.document_tokens
    assert not found.common


def test_a_model_of_dense_vectors_explains_nothing(folders):
    with pytest.raises(ValueError, match="dense vectors alone"):
        Embedder(folders["dense"], device="cpu").explain("a", "b")


# ---- rerankers ------------------------------------------------------------------------------------------


def test_a_reranker_by_token_vectors_scores_as_sentence_transformers(folders):
    other = MultiVectorEncoder(folders["colbert"], device="cpu")
    queries, documents = other.encode_query(QUERIES), other.encode_document([text for text in DOCUMENTS if text])
    expected = other.similarity(queries, documents).numpy()
    reranker = Reranker(folders["colbert"], device="cpu")
    pairs = [(query, text) for query in QUERIES for text in DOCUMENTS if text]
    np.testing.assert_allclose(reranker.compute_score(pairs), expected.ravel(), atol=1e-4)
    results = reranker.rerank(QUERIES[0], [text for text in DOCUMENTS if text])
    assert [result.document_index for result in results] == np.argsort(-expected[0], kind="stable").tolist()
    assert results.score_type == "logit" and reranker.max_length == 48


def test_a_folder_with_several_representations_ranks_by_its_token_vectors(m3, folders):
    reranker = Reranker(folders["m3"], device="cpu")
    np.testing.assert_allclose(reranker.compute_score(PAIRS), m3.compute_score(PAIRS).multi_vector, atol=1e-5)
    assert reranker.backend.describe().startswith("token vectors, 64 tokens of a query and 64 of a document")
    with pytest.raises(ValueError, match="token vectors"):
        reranker.compute_score(PAIRS, cutoff_layers=2)


def test_each_text_of_a_call_is_encoded_once(folders):
    reranker, texts = Reranker(folders["m3"], device="cpu"), []
    reranker.backend.embedder.model.register_forward_pre_hook(lambda _, given: texts.append(len(given[0])))
    reranker.rerank_many(QUERIES, [DOCUMENTS[:5]] * 3)
    assert sum(texts) == len(QUERIES) + 5


def test_a_text_is_another_as_a_query_than_as_a_document(folders, tmp_path):
    """Without prompts and mask tokens both have equal ids, and the document alone loses its punctuation."""
    plain = {"prompts": {"query": "", "document": ""}, "query_expansion": False}
    bert = Path(folders["colbert"]).parent / "bert"
    model = EmbeddingModel.from_pretrained(bert, representations=["multi_vector"], **plain)
    model.save_pretrained(tmp_path / "plain")
    pair = ["Fever, cough, sugar.", "Fever, cough, sugar."]
    (found,) = Reranker(tmp_path / "plain", device="cpu").compute_score(pair)
    (expected,) = Embedder(tmp_path / "plain", device="cpu").compute_score(pair).multi_vector
    assert found == pytest.approx(expected, abs=1e-4)
    query = model.text_encoder.encode(pair[:1], "query")[0]
    assert found < len(query) - 0.1  # each token of the query would meet itself


def test_the_best_slice_of_a_long_document_counts(folders):
    reranker = Reranker(folders["m3"], device="cpu", max_length=20)
    query, document = QUERIES[0], DOCUMENTS[-1]
    (result,) = reranker.rerank(query, [document], long_document="max_slice", overlap=0)
    start, stop = result.slice
    assert 0 <= start < stop <= len(document) and not result.truncated
    (again,) = reranker.rerank(query, [document[start:stop]])
    assert result.score == pytest.approx(again.score, abs=1e-4) and not again.truncated
    (cut,) = reranker.rerank(query, [document])
    assert cut.truncated and cut.score <= result.score


def test_an_option_of_cross_encoders_is_ignored_with_a_warning(folders, caplog):
    caplog.set_level(logging.WARNING, logger="rag_retrieval")
    expected = Reranker(folders["m3"], device="cpu").compute_score(PAIRS[:3])
    found = Reranker(folders["m3"], device="cpu", query_format="query: {}").compute_score(PAIRS[:3])
    np.testing.assert_array_equal(found, expected)
    assert "query_format" in caplog.text


def test_a_model_of_dense_vectors_is_no_reranker(folders):
    with pytest.raises(ValueError, match="embedding model"):
        Reranker(folders["dense"], device="cpu")


# ---- RAG-Retrieval's class ------------------------------------------------------------------------------


def test_the_class_of_rag_retrieval_gives_the_means_that_it_gave(folders):
    model = ColBERT.from_pretrained(folders["m3"], colbert_dim=WIDTH).eval().to("cpu")
    pairs = PAIRS[:: len(PAIRS) // 5]
    expected = [slow_scores(folders["m3"], pair)[2] for pair in pairs]
    found = model.compute_score(pairs, batch_size=2, query_max_len=64, passage_max_len=64)
    assert isinstance(found, list) and found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=f"colbert_dim 1024: .* have {WIDTH} numbers"):
        ColBERT.from_pretrained(folders["m3"], colbert_dim=1024)
    with pytest.raises(ValueError, match="no token vectors"):
        ColBERT.from_pretrained(folders["dense"])


def test_a_folder_that_rag_retrieval_wrote_is_opened_by_its_class(folders, tmp_path):
    """It holds transformers' files, the weights in pytorch_model.bin, and the projection alone."""
    base = Path(folders["m3"]).parent / "base"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path)
    torch.save(AutoModel.from_pretrained(base).state_dict(), tmp_path / "pytorch_model.bin")
    shutil.copy(Path(folders["m3"]) / "colbert_linear.pt", tmp_path)
    pairs = PAIRS[:: len(PAIRS) // 5]
    expected = [slow_scores(folders["m3"], pair)[2] for pair in pairs]
    model = ColBERT.from_pretrained(str(tmp_path), WIDTH, cuda_device="cpu", mask_punctuation=False, temperature=0.02)
    assert model.compute_score(pairs, query_max_len=64, passage_max_len=64) == pytest.approx(expected, abs=1e-4)


def test_the_blocks_of_the_page_run_in_order(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["m3"], tmp_path / "runs" / "m3" / "model")
    monkeypatch.chdir(tmp_path)
    after = PAGE.read_text(encoding="utf-8").partition("## Lexical weights and token vectors\n")[2]
    section = after.partition("\n## ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(block, names)
    assert names["found"].multi_vector[0].shape[1] == WIDTH
    expected = names["colbert"].compute_score([(names["query"], text) for text in names["texts"]])
    np.testing.assert_allclose(names["scores"].multi_vector, expected, atol=1e-5)
    assert (tmp_path / "why.html").is_file()
