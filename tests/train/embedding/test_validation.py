"""What an evaluation of an embedder measures, against slow plain code on given vectors; and what it says of a run."""

import errno
import logging
import math
import zlib

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from beir_samples import write, write_toy

from rag_retrieval.data.collection import Collection, beir_collection
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import Representations
from rag_retrieval.train.embedding import shared_encoding, validation
from rag_retrieval.train.embedding.shared_encoding import SharedEncoding
from rag_retrieval.train.embedding.validation import EmbeddingValidation, mean_cosine
from rag_retrieval.train.task import ProcessFailure, TrainingError

WIDTH = 6


class Words:
    """Encodes a text as one token for each of its words, after one for its kind or its prompt."""

    def __init__(self):
        self.encoded = []

    def encode(self, texts, kind=None, prompt=None):
        self.encoded += texts
        return [encoded_words([prompt or f"{kind}:", *text.split()]) for text in texts]


def encoded_words(words):
    ids = [zlib.crc32(word.encode()) % 1000 for word in words]
    return EncodedPair(np.array(ids, np.int32), None, False, 0)


class Table:
    """A model that gives the sum of its tokens' rows, whole numbers: exact, whatever the batch."""

    def __init__(self, seed=0, low=-3):
        self.rows = torch.from_numpy(np.random.default_rng(seed).integers(low, 4, (1000, WIDTH))).float()
        self.sizes = []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        texts = torch.from_numpy(batch.ids).long().split(batch.lengths.tolist())
        return Representations(torch.stack([self.rows[text].sum(0) for text in texts]))

    def vector(self, text, kind):
        return self.rows[encoded_words([f"{kind}:", *text.split()]).ids].sum(0).double().numpy()


def encoding_of(collection: Collection, encoder=None, **options) -> SharedEncoding:
    options = {"max_tokens": 40, "padded": True, "batch_size": 8} | options
    return SharedEncoding(collection, encoder or Words(), Accelerator(cpu=True), **options)


def dense_of(encoding: SharedEncoding, model: Table) -> list[np.ndarray]:
    return [side["dense"].values.numpy() for side in encoding(model)]


def validation_of(collection: Collection, *, cosine=True, **options) -> EmbeddingValidation:
    objective = Objective((), normalize=cosine)
    return EmbeddingValidation(collection, encoding_of(collection), objective=objective, **options)


@pytest.fixture
def toy(tmp_path) -> Collection:
    """4 queries over 72 documents, with grades, two relevant ones and one that is judged 0."""
    folder = write_toy(tmp_path)
    judged = {"q8": {"d8-0": 2, "d8-1": 1}, "q9": {"d9-0": 1, "d9-3": 0}, "q10": {"d0-0": 1}, "q11": {"d11-5": 3}}
    lines = [f"{query}\t{document}\t{grade}\n" for query, of in judged.items() for document, grade in of.items()]
    write(folder / "qrels/dev.tsv", "".join(lines))
    return beir_collection(folder, "dev")


def slow_ranking(collection, query, model, cosine):
    """Documents of the pool or corpus by falling score, equal ones by falling id: one product after another."""
    asked = model.vector(collection.queries[query], "query")
    scores = {}
    for document in collection.documents if collection.pool is None else collection.pool[query]:
        vector = model.vector(collection.documents[document], "document")
        score = float(asked @ vector)
        if cosine:
            score /= np.linalg.norm(asked) * np.linalg.norm(vector)
        scores[document] = round(score, 6)
    return sorted(sorted(scores, reverse=True), key=lambda document: -scores[document])


def slow_metrics(collection, model, cosine):
    ndcg, mrr, recall = [], [], []
    for query, grades in collection.qrels.items():
        relevant = {document for document, grade in grades.items() if grade >= 1}
        ranking = slow_ranking(collection, query, model, cosine)[:10]
        gains = [grades.get(document, 0) / math.log2(rank + 2) for rank, document in enumerate(ranking)]
        ideal = sum(grade / math.log2(rank + 2) for rank, grade in enumerate(sorted(grades.values(), reverse=True)))
        ndcg.append(sum(gains) / ideal)
        hits = [rank for rank, document in enumerate(ranking, start=1) if document in relevant]
        mrr.append(1 / hits[0] if hits else 0.0)
        recall.append(len(hits) / len(relevant))
    return {"ndcg@10": np.mean(ndcg), "mrr@10": np.mean(mrr), "recall@10": np.mean(recall)}


@pytest.mark.parametrize("cosine", [True, False])
def test_metrics_are_those_of_a_slow_search_of_the_whole_corpus(toy, cosine):
    for seed in range(3):
        values = validation_of(toy, cosine=cosine)(Table(seed), 0)
        expected = slow_metrics(toy, Table(seed), cosine)
        assert {name: values[name] for name in expected} == pytest.approx(expected)
        assert values["queries"] == 4 and values["queries_without_relevant"] == 0


def test_grades_are_gains_and_positives_are_what_is_found(toy):
    """Without the positives the document of grade 0.5 is not relevant, and q9 is in no mean."""
    qrels = {"q8": {"d8-0": 0.5, "d8-1": 0.25}, "q9": {"d9-0": 0.5, "d9-1": 0.5}}
    queries = {query: toy.queries[query] for query in qrels}
    made = Collection("toy", queries, toy.documents, qrels, positives={("q8", "d8-0")})
    values = validation_of(made, names=["ndcg@40", "mrr@1000"])(Table(), 0)
    ranks = {document: rank for rank, document in enumerate(slow_ranking(made, "q8", Table(), True), start=1)}
    gains = sum(grade / math.log2(ranks[name] + 1) for name, grade in qrels["q8"].items() if ranks[name] <= 40)
    assert values["mrr@1000"] == pytest.approx(1 / ranks["d8-0"])
    assert values["ndcg@40"] == pytest.approx(gains / (0.5 + 0.25 / math.log2(3)))
    assert (values["queries"], values["queries_without_relevant"]) == (1, 1)


def test_a_query_with_a_pool_is_ranked_against_it_alone(toy):
    pool = {query: [f"d{query[1:]}-{place}" for place in range(6)] for query in toy.queries}
    pooled = Collection("toy", toy.queries, toy.documents, toy.qrels, pool=pool)
    values = validation_of(pooled)(Table(), 0)
    expected = slow_metrics(pooled, Table(), True)
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_of_equal_scores_the_greater_id_ranks_first():
    """All documents have one vector: of the 12 ids the greatest ten, as texts, rank first."""
    documents = {f"d{place}": f"{'same ' * (place + 1)}" for place in range(12)}
    documents = {document: documents[document] for document in sorted(documents)}

    class One(Table):
        def __call__(self, batch):
            return Representations(torch.eye(1, WIDTH).expand(len(batch), -1))  # whose products are exact

    for relevant, recall in (("d9", 1.0), ("d2", 1.0), ("d10", 1.0), ("d1", 0.0), ("d0", 0.0)):
        collection = Collection("", {"q": "ask"}, documents, {"q": {relevant: 1}})
        assert validation_of(collection)(One(), 0)["recall@10"] == recall, relevant


def test_a_query_with_a_prompt_of_its_own_is_encoded_with_it():
    queries = {"q1": "a b", "q2": "a b"}
    collection, model = Collection("", queries, {"d1": "c"}, {}, prompts={"q1": "say:"}), Table()
    vectors, _ = dense_of(encoding_of(collection), model)
    for vector, start in zip(vectors, ("say:", "query:"), strict=True):
        assert vector.tolist() == model.rows[encoded_words([start, "a", "b"]).ids].sum(0).tolist()


# ---- encoding


def test_no_forward_is_above_its_bounds_and_each_text_is_tokenized_once(toy):
    for padded in (True, False):
        encoder = Words()
        made = encoding_of(toy, encoder, padded=padded)
        costs = [len(b) * b.lengths.max() if padded else b.lengths.sum() for _, b in made.batches]
        assert max(costs) <= 40 and max(len(b) for _, b in made.batches) <= 8
        for _ in range(2):
            made(Table())
        assert sorted(encoder.encoded) == sorted([*toy.queries.values(), *set(toy.documents.values()), "filler"])


def test_equal_documents_are_encoded_once_and_both_ranked():
    documents = {"d1": "one", "d2": "two", "d3": "one"}
    collection = Collection("", {"q": "one"}, documents, {"q": {"d1": 1}})
    encoder = Words()
    encoding = encoding_of(collection, encoder)
    _, vectors = dense_of(encoding, Table())
    assert encoder.encoded.count("one") == 2, "the query, and a document"
    assert len(vectors) == 3 and vectors[0].tolist() == vectors[2].tolist() != vectors[1].tolist()


def test_any_number_of_processes_makes_the_same_forwards(toy, monkeypatch):
    """Three blocks of 30 texts: the second of two processes has one, and fillers."""
    monkeypatch.setattr(shared_encoding, "BLOCK", 30)
    alone = encoding_of(toy).batches
    shares = []
    for rank in range(2):
        monkeypatch.setattr(shared_encoding, "process_count", lambda: 2)
        monkeypatch.setattr(shared_encoding, "process_index", lambda rank=rank: rank)
        monkeypatch.setattr(shared_encoding, "gather", lambda value: [value, 50])
        shares.append(encoding_of(toy).batches)
    assert [len(share) for share in shares] == [50, 50]
    dealt = [batch for share in shares for batch in share if batch[0]]
    assert sorted(places for places, _ in dealt) == sorted(places for places, _ in alone)
    for places, batch in dealt:
        (expected,) = [other for own, other in alone if own == places]
        assert np.array_equal(batch.ids, expected.ids)


def test_vectors_stand_in_the_order_of_the_texts(toy, monkeypatch):
    monkeypatch.setattr(shared_encoding, "BLOCK", 7)
    monkeypatch.setattr(shared_encoding, "GATHERED", 5)
    model = Table()
    queries, documents = dense_of(encoding_of(toy), model)
    for kind, texts, vectors in (("query", toy.queries, queries), ("document", toy.documents, documents)):
        assert vectors.tolist() == [model.vector(text, kind).tolist() for text in texts.values()]


def test_a_forward_that_does_not_fit_in_memory_is_halved(toy, caplog):
    class Small(Table):
        def __call__(self, batch):
            if len(batch) > 3:
                raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
            return super().__call__(batch)

    small = Small()
    assert validation_of(toy)(small, 0) == validation_of(toy)(Table(), 0)
    assert max(small.sizes) <= 3 and "do not fit in memory" in caplog.text


def test_a_vector_that_is_not_finite_ends_the_run_and_is_named(toy):
    model = Table()
    model.rows[encoded_words(["planet"]).ids] = math.inf
    with pytest.raises(TrainingError, match=r"6 of 64 validation texts .*'planet text 0'"):
        validation_of(toy)(model, 3)


# ---- what is said of the data and of the run


def test_queries_without_a_relevant_document_are_counted_and_named(toy, caplog):
    qrels = toy.qrels | {"q9": {"d9-0": 0}, "q10": {"gone": 1}}
    made = validation_of(Collection("toy", toy.queries, toy.documents, qrels))
    assert "where is violin" not in caplog.text and "where is falcon 9" in caplog.text and "'gone'" in caplog.text
    values = made(Table(), 0)
    assert (values["queries"], values["queries_without_relevant"]) == (3, 1)


def test_without_any_relevant_document_no_ranking_metric_is_measured(toy):
    made = validation_of(Collection("toy", toy.queries, toy.documents, {query: {} for query in toy.queries}))
    assert made.metrics == [] and set(made(Table(), 0)) == {"mean_cosine"}


def test_every_later_evaluation_has_the_start_and_a_paired_test_beside_it(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start = tmp_path / "start.json"
    before = validation_of(toy, start=start)(Table(1), 0)
    assert not [name for name in before if "start" in name]
    for made in (validation_of(toy, start=start), validation_of(toy, start=start)):  # a resumed run has the file alone
        values = made(Table(2), 5)
        assert values["ndcg@10_at_start"] == before["ndcg@10"] != values["ndcg@10"]
        assert 0 < values["ndcg@10_p_value"] <= 1
    assert f"{values['ndcg@10'] - before['ndcg@10']:+.4f}" in caplog.text
    assert not [name for name in validation_of(toy)(Table(2), 5) if "start" in name]


class Ranked:
    """Gives each of eight queries, the texts of the documents, its document at rank 1 or 2."""

    def __init__(self, rank):
        self.rank, self.query = rank, encoded_words(["query:"]).ids[0]
        self.numbers = {encoded_words([f"w{number}"]).ids[0]: number for number in range(8)}

    def __call__(self, batch):
        vectors = torch.zeros(len(batch), 8)
        for vector, text in zip(vectors, np.split(batch.ids, np.cumsum(batch.lengths)[:-1]), strict=True):
            number = self.numbers[text[1]]
            vector[number] = 1.0
            if self.rank == 2 and text[0] == self.query:
                vector[(number + 1) % 8] = 2.0
        return Representations(vectors)


def test_lower_figures_have_the_p_value_of_all_signs_and_are_a_warning(tmp_path, caplog):
    """Eight queries lost a rank each: 2 of the 256 ways to sign their differences are as extreme."""
    texts = [f"w{number}" for number in range(8)]
    queries, documents = ({f"{kind}{text}": text for text in texts} for kind in "qd")
    collection = Collection("", queries, documents, {f"q{text}": {f"d{text}": 1} for text in texts})
    made = validation_of(collection, start=tmp_path / "start.json")
    assert made(Ranked(1), 0)["ndcg@10"] == 1.0
    values = made(Ranked(2), 4)
    assert values["ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert values["ndcg@10_p_value"] == pytest.approx(2 / 256)
    assert "ndcg@10 is lower than before training" in caplog.text


def test_a_disk_that_is_full_is_told_as_such(toy, tmp_path, monkeypatch):
    def full(path, values):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(validation, "write_json", full)
    with pytest.raises(ProcessFailure, match="no space left"):
        validation_of(toy, start=tmp_path / "start.json")(Table(1), 0)


def test_a_start_on_other_data_is_not_compared_with(toy, tmp_path):
    start = tmp_path / "start.json"
    validation_of(toy, start=start)(Table(1), 0)
    other = Collection("toy", toy.queries, toy.documents | {"d8-0": "another"}, toy.qrels)
    assert not [name for name in validation_of(other, start=start)(Table(2), 5) if "start" in name]


def test_vectors_that_did_not_change_are_a_warning(toy, caplog):
    made = validation_of(toy)
    made(Table(1), 0), made(Table(2), 1)
    assert "did not change" not in caplog.text
    made(Table(1), 7)
    assert "did not change since step 0" in caplog.text and "step 7" in caplog.text


def test_vectors_that_all_point_one_way_are_a_warning(toy, caplog):
    validation_of(toy)(Table(1), 0)
    assert "same way" not in caplog.text
    model = Table(1)
    model.rows[:, 0] += 200
    values = validation_of(toy)(model, 4)
    assert values["mean_cosine"] > 0.99 and "same way" in caplog.text


def test_the_mean_cosine_is_that_of_all_pairs_of_documents():
    vectors = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], np.float32)
    assert mean_cosine(vectors) == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert math.isnan(mean_cosine(vectors[:1]))
