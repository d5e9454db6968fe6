"""The data that an embedder is validated on, and the loss and the correlation on them, against slow plain code."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from beir_samples import write, write_toy
from training_runs import write_jsonl

from rag_retrieval.core.distributed import StartError
from rag_retrieval.data.collection import store_collection
from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.data.store import open_store
from rag_retrieval.losses.embedding import Flops, Objective, SelfDistillation, objective_of
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import Representations
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.text_outputs import Entries
from rag_retrieval.train.embedding.validation_data import (
    LabelCorrelation,
    best_metric,
    make_validation,
    open_validation,
)

RECORDS = [
    {"query": "apple", "pos": ["an apple", "a red apple"], "neg": ["a river"]},
    {"query": "river", "pos": ["a river"], "neg": ["an engine", "an apple"]},
    {"query": "engine", "pos": ["an engine"]},
    {"query": "harbor", "pos": ["a harbor"], "neg": ["a river"]},
    {"query": "desert", "pos": ["a desert"]},
]
TEMPERATURE = 0.2


class Words:
    def encode(self, texts, kind=None, prompt=None):
        return [self.encoded(f"{kind}:{text}") for text in texts]

    def encoded(self, text):
        return EncodedPair(np.frombuffer(text.encode(), np.uint8).astype(np.int32), None, False, 0)


def dense(vectors: np.ndarray) -> dict[str, Entries]:
    return {"dense": Entries(torch.from_numpy(vectors).float(), torch.ones(len(vectors), dtype=torch.int64))}


class Letters:
    """A model that gives the sum of the rows of its text's characters."""

    packs = False
    text_encoder = Words()
    settings, dim = SimpleNamespace(similarity="cosine"), 8

    def __init__(self):
        self.rows = torch.from_numpy(np.random.default_rng(3).normal(size=(256, 8))).float()

    def __call__(self, batch):
        texts = torch.from_numpy(batch.ids).long().split(batch.lengths.tolist())
        return Representations(torch.stack([self.rows[text].sum(0) for text in texts]))

    def unit(self, kind, text):
        vector = self.rows[torch.from_numpy(Words().encoded(f"{kind}:{text}").ids).long()].double().sum(0).numpy()
        return vector / np.linalg.norm(vector)


@pytest.fixture
def config(tmp_path):
    def make(**changes) -> EmbeddingConfig:
        values = {"model_name_or_path": "m", "train_dataset": "t.jsonl", "output_dir": str(tmp_path), "batch_size": 2}
        return EmbeddingConfig(**values | changes)

    return make


@pytest.fixture
def records(tmp_path):
    return lambda records: write_jsonl(tmp_path / "val.jsonl", records)


def validation_of(config, objective=None):
    objective = objective or objective_of({"info_nce": 1.0}, {"temperature": TEMPERATURE})
    return make_validation(open_validation(config), config, Letters(), Accelerator(cpu=True), objective)


def slow_info_nce(records, step: int) -> float:
    """Of steps of so many records: documents that are a positive of the query anywhere are no negatives."""
    model, losses = Letters(), []
    known = {record["query"]: record["pos"] for record in records}
    for start in range(0, len(records), step):
        part = records[start : start + step]
        documents = list(dict.fromkeys(text for each in part for text in (each["pos"][0], *each.get("neg", []))))
        for record in part:
            query, positive = model.unit("query", record["query"]), record["pos"][0]
            exponents = {
                text: float(query @ model.unit("document", text)) / TEMPERATURE
                for text in documents
                if text == positive or text not in known[record["query"]]
            }
            losses.append(math.log(sum(map(math.exp, exponents.values()))) - exponents[positive])
    return sum(losses) / len(losses)


def first_positive_alone(records):
    return [record | {"pos": record["pos"][:1]} for record in records]


@pytest.mark.parametrize("batch_size, accumulation", [(2, 1), (1, 2), (3, 1), (8, 1)])
def test_the_loss_is_that_of_steps_in_the_order_of_the_file(config, records, batch_size, accumulation):
    own = first_positive_alone(RECORDS)
    made = config(val_dataset=records(own), batch_size=batch_size, gradient_accumulation_steps=accumulation)
    values = validation_of(made)(Letters(), 0)
    assert values["loss"] == pytest.approx(slow_info_nce(own, batch_size * accumulation), abs=1e-6)


def test_a_loss_that_needs_what_the_records_lack_is_not_measured(config, records):
    options = {"false_negative_judge": "guide", "false_negative_margin": 0.0}
    made = validation_of(config(val_dataset=records(RECORDS)), objective_of({"info_nce": 1.0}, options))
    assert "loss" not in made.metrics and "ndcg@10" in made.metrics


def test_records_are_searched_in_the_documents_of_all(config, records):
    values = validation_of(config(val_dataset=records(RECORDS)))(Letters(), 0)
    model, ranks = Letters(), []
    documents = dict.fromkeys(text for record in RECORDS for text in (*record["pos"], *record.get("neg", [])))
    for record in RECORDS:
        scores = {text: model.unit("query", record["query"]) @ model.unit("document", text) for text in documents}
        ranking = sorted(documents, key=scores.get, reverse=True)
        ranks.append(min(ranking.index(text) + 1 for text in record["pos"]))
    assert values["queries"] == 5
    assert values["mrr@10"] == pytest.approx(np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]))


def test_spearman_is_that_of_the_ranks_of_cosines_and_labels(tmp_path):
    labels = [0.1, 0.8, 0.3, 0.9, 0.5]
    pairs = [(f"first {place % 3}", f"second {place}") for place in range(5)]
    written = [
        {"query": query, "content": text, "label": label}
        for (query, text), label in zip(pairs, labels, strict=True)
    ]
    rules = RecordRules(for_embedder=True)
    store = open_store(write_jsonl(tmp_path / "pairs.jsonl", written), rules, group_by_query=True)
    collection, model = store_collection(store, ""), Letters()
    queries = np.array([model.unit("query", text) for text in collection.queries.values()])
    documents = np.array([model.unit("document", text) for text in collection.documents.values()])
    cosines = [model.unit("query", query) @ model.unit("document", text) for query, text in pairs]
    ranks = [np.argsort(np.argsort(values)) for values in (cosines, labels)]
    squares = sum(int(difference) ** 2 for difference in ranks[0] - ranks[1])
    measure = LabelCorrelation(store, Objective((), normalize=False))
    assert measure(dense(queries), dense(documents)) == pytest.approx(1 - 6 * squares / (5 * (25 - 1)))
    assert measure(dense(np.ones_like(queries)), dense(np.ones_like(documents))) == 0.0


def test_graded_pairs_have_their_correlation_and_loss_in_place_of_ranks(config, records):
    """CoSENT: log(1 + sum of exp(20 (cos_j - cos_i)) over pairs with label_i > label_j), over the whole step."""
    pairs = [("an apple", "a pear", 0.9), ("a river", "a lake", 0.7), ("a river", "a song", 0.1), ("it", "that", 0.5)]
    written = [{"query": query, "content": text, "label": label} for query, text, label in pairs]
    made = config(val_dataset=records(written), loss_type="cosent", batch_size=8)
    objective = objective_of(made.loss_weights, made.loss_options)
    validation = validation_of(made, objective)
    assert validation.metrics == ["spearman", "loss"] and best_metric(made, validation) == "spearman"
    values, model = validation(Letters(), 0), Letters()
    cosines = [model.unit("query", query) @ model.unit("document", text) for query, text, _ in pairs]
    terms = [
        math.exp(20 * (cosines[low] - cosines[high]))
        for high, (*_, above) in enumerate(pairs)
        for low, (*_, below) in enumerate(pairs)
        if above > below
    ]
    assert values["loss"] == pytest.approx(math.log(1 + sum(terms)), abs=1e-5)
    assert "ndcg@10" not in values and -1 <= values["spearman"] <= 1


def test_matryoshka_is_measured_at_every_width_as_if_the_model_had_no_more(config, records):
    class Narrow(Letters):
        def __init__(self, width):
            super().__init__()
            self.rows = self.rows[:, :width]

    made = config(val_dataset=records(RECORDS), use_mrl=True, mrl_dims=[2, 5, 8])
    values = validation_of(made, objective_of({"info_nce": 1.0}, {}, made.widths))(Letters(), 0)
    assert {name for name in values if "/" in name} == {"ndcg@10/2", "ndcg@10/5"}
    for width in (2, 5):
        expected = validation_of(config(val_dataset=records(RECORDS)))(Narrow(width), 0)["ndcg@10"]
        assert values[f"ndcg@10/{width}"] == pytest.approx(expected)


def test_a_beir_folder_is_searched_whole_and_has_no_loss(config, tmp_path):
    folder = write_toy(tmp_path / "toy")
    made = config(val_dataset=str(folder), val_split="test", metric_for_best_model="recall@3")
    data = open_validation(made)
    assert data.store is None and len(data.collection.documents) == 72
    assert {path.name for path in data.files} == {"corpus.jsonl", "queries.jsonl", "test.tsv"}
    validation = validation_of(made)
    assert validation.metrics == ["recall@3", "ndcg@10", "mrr@10", "recall@10", "recall@100"]
    assert best_metric(made, validation) == "recall@3"


def test_the_split_of_a_beir_folder_is_dev_unless_it_is_named(config, tmp_path):
    folder = write_toy(tmp_path / "toy")
    with pytest.raises(DataError, match="dev"):
        open_validation(config(val_dataset=str(folder)))
    write(folder / "qrels/dev.tsv", "q1\td1-0\t1\n")
    assert list(open_validation(config(val_dataset=str(folder))).collection.queries) == ["q1"]


def test_without_validation_data_nothing_is_opened(config):
    assert open_validation(config()) is None and best_metric(config(), None) is None


def test_a_metric_that_cannot_be_measured_gives_way_with_a_warning(config, records, tmp_path, caplog):
    made = config(val_dataset=str(write_toy(tmp_path / "toy")), val_split="test", metric_for_best_model="loss")
    assert best_metric(made, validation_of(made)) == "ndcg@10" and "loss" in caplog.text
    hits = [{"content": text, "label": 0} for text in ("a", "b")]
    irrelevant = config(val_dataset=records([{"query": "q", "hits": hits}]))
    with pytest.raises(StartError, match="relevant"):
        best_metric(irrelevant, validation_of(irrelevant))


@pytest.mark.parametrize("name", ["accuracy", "ndcg", "spearman@3"])
def test_a_metric_that_is_none_is_refused(config, name):
    with pytest.raises(ValueError, match=name):
        config(metric_for_best_model=name, val_dataset="val.jsonl")


def test_embedders_are_validated_before_the_first_step_unless_told_otherwise(config, records):
    file = records(RECORDS)
    assert config(val_dataset=file).eval_on_start is True and config().eval_on_start is None
    assert validation_of(config(val_dataset=file)).start.name == "validation_start.json"
    assert validation_of(config(val_dataset=file, eval_on_start=False)).start is None


def test_graded_pairs_decide_by_their_correlation_and_a_beir_folder_by_its_ranks(config, records, tmp_path):
    folder = str(write_toy(tmp_path / "toy"))
    assert config(loss_type="cosent", val_dataset=records(RECORDS)).metric_for_best_model == "spearman"
    assert config(loss_type="cosent", val_dataset=folder).metric_for_best_model == "ndcg@10"


def test_the_loss_is_without_self_distillation_and_regularization(config, records):
    made = config(val_dataset=records(RECORDS))
    taught = replace(Objective(()), flops=Flops(1.0, 1.0), self_distillation=SelfDistillation({}))
    measured = validation_of(made, taught).measures["loss"].objective
    assert (measured.flops, measured.self_distillation) == (None, None)


def test_vectors_are_compared_as_the_loss_compares_them(config, records):
    made = config(val_dataset=records(RECORDS))
    assert validation_of(made).objective.normalize
    assert not validation_of(made, objective_of({"info_nce": 1.0}, {}, normalize=False)).objective.normalize
