import json
import math
import sys
import time
from pathlib import Path

import pytest
from beir_samples import write, write_lines, write_toy
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality
import quality_tables
import quality_trainers

from rag_retrieval.data.beir import read_folder
from rag_retrieval.evaluate.ranking_data import first_stage


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


# --- records ---


def test_no_negative_is_judged_relevant_and_all_come_from_the_top(toy):
    folder = read_folder(toy)
    records = quality.training_records(folder, count=8, negatives=3, depth=4, seed=0)
    assert len(records) == 8
    for record in records:
        topic = record["query"].split()[2]
        assert record["pos"] == [f"{topic} text 0"]
        # of BM25's best four documents 1, 2, 0, 3 the relevant one is no negative
        assert sorted(record["neg"]) == [f"{topic} {topic} text {number}" for number in (1, 2, 3)]


def test_records_follow_the_seed_and_fewer_are_the_first_of_more(toy):
    folder = read_folder(toy)
    drawn = quality.training_records(folder, count=8, negatives=2, depth=5, seed=1)
    assert drawn == quality.training_records(folder, count=8, negatives=2, depth=5, seed=1)
    assert drawn[:3] == quality.training_records(folder, count=3, negatives=2, depth=5, seed=1)
    other = quality.training_records(folder, count=8, negatives=2, depth=5, seed=2)
    assert [record["query"] for record in drawn] != [record["query"] for record in other]
    negatives = [{record["query"]: set(record["neg"]) for record in records} for records in (drawn, other)]
    assert negatives[0].keys() == negatives[1].keys() and negatives[0] != negatives[1]


def test_queries_without_text_or_without_a_negative_give_no_record(toy):
    relevant = "".join(f"q0\td0-{document}\t1\n" for document in range(5))
    rest = "q1\td1-1\t0\nq1\td1-2\t2\nq2\td2-0\t1\n"
    write(toy / "qrels/train.tsv", "query-id\tcorpus-id\tscore\n" + relevant + rest)
    text = (toy / "queries.jsonl").read_text()
    blank = [line if '"q2"' not in line else '{"_id": "q2", "text": " "}' for line in text.splitlines()]
    (toy / "queries.jsonl").write_text("\n".join(blank) + "\n")
    (record,) = quality.training_records(read_folder(toy), count=8, negatives=1, depth=2, seed=0)
    assert record["query"] == "where is river 1"
    assert record["pos"] == ["river river text 2"] and record["neg"] == ["river river text 1"], "grade 0 is no positive"


def test_the_test_queries_are_the_same_for_every_run():
    qrels = {f"q{number}": {"d": 1} for number in range(50)}
    assert quality.choose_queries(qrels, "all") == qrels
    assert quality.choose_queries(qrels, "5") == quality.choose_queries(dict(reversed(qrels.items())), "5")
    assert len(quality.choose_queries(qrels, "5")) == 5


def test_scores_return_to_the_pairs_they_were_computed_for(toy):
    folder = read_folder(toy)
    candidates = first_stage(folder, "test", ["q8", "q9"], None, "bm25", depth=2).run
    pairs = quality.pairs_of(folder, candidates)
    assert pairs[2] == ("where is falcon 9", "falcon falcon text 1")
    run = quality.reranked(candidates, [0.1, 0.2, 0.3, 0.4])
    assert run == {"q8": {"d8-1": 0.1, "d8-2": 0.2}, "q9": {"d9-1": 0.3, "d9-2": 0.4}}


# --- the two trainers ---


def recipe(loss: str, **changes) -> quality_trainers.Recipe:
    values = {"model": "m", "negatives": 3, "max_len": 32, "lr": 1e-4, "head_lr": 1e-3, "seed": 0, "precision": "no"}
    values |= changes
    return quality_trainers.Recipe(loss=loss, **values)


def our_pairs(records: list[dict], folder: Path, grouped: bool) -> list[tuple[str, str, float]]:
    """What our trainer reads: the store's pairs."""
    from rag_retrieval.data.store import open_store

    path = folder / "records.jsonl"
    write_lines(path, records)
    store = open_store(path, group_by_query=grouped, cache_dir=folder / "cache")
    pairs = [store.pair(number) for number in range(store.num_pairs)]
    return [(pair.query, pair.document, float(pair.label)) for pair in pairs]


def test_both_trainers_get_the_same_pairs_and_labels(toy, tmp_path):
    records = quality.training_records(read_folder(toy), count=8, negatives=3, depth=5, seed=0)
    rows = quality_trainers.pair_rows(records)
    flat = [(row["query"], row["document"], row["label"]) for row in rows]
    grouped = [
        (row["query"], document, label)
        for row in quality_trainers.group_rows(records)
        for document, label in zip(row["documents"], row["labels"], strict=True)
    ]
    assert len(flat) == 8 * 4 and sum(label for *_, label in flat) == 8
    assert flat == grouped == our_pairs(records, tmp_path, grouped=False)
    assert sorted(flat) == sorted(our_pairs(records, tmp_path, grouped=True))


def test_a_step_has_whole_groups_of_at_most_32_pairs():
    for negatives, groups, pairs in [(3, 8, 32), (4, 6, 30), (40, 1, 41)]:
        one = recipe("point_ce", negatives=negatives)
        assert (one.groups_per_step, one.pairs_per_step) == (groups, pairs)


def test_our_configuration_asks_for_32_pairs_per_step_and_is_valid(tmp_path):
    from rag_retrieval.train.reranker.config import RerankerConfig

    for loss in quality_tables.LOSSES:
        values = quality_trainers.our_config(recipe(loss), tmp_path / "train.jsonl", tmp_path / "out")
        config = RerankerConfig(**values)
        assert config.batch_size * (config.train_group_size or 1) == 32
        assert (config.lr, config.head_lr, config.loss_type) == (1e-4, 1e-3, loss)


# --- tables ---


def result(seed: int, ndcg: float, **changes) -> dict:
    values = {"ndcg@10": ndcg, "mrr@10": 0.5, "map": 0.25}
    return {
        "setting": {"data": "toy", "lr": 1e-4},
        "trainer": "ours",
        "loss": "listwise_ce",
        "records": "bm25",
        "per_query": {"q1": ndcg - 0.1, "q2": ndcg + 0.1, "q3": ndcg},
        "seed": seed,
        "figures": {"BM25": values | {"ndcg@10": 0.6}, "trained": values},
        "training": {"seconds": 100.0 + seed, "cpu_seconds": 200.0},
        "scoring": {"seconds": 10.0, "cpu_seconds": 20.0},
        "threads": 2,
        "cores": 2,
        "versions": {"torch": "2"},
    } | changes


def trained_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and "ours" in line]


def test_seeds_become_one_row_with_mean_and_range():
    text = quality_tables.markdown_tables([result(0, 0.90), result(2, 0.94)])
    assert trained_lines(text) == [
        "| listwise_ce | bm25 | ours | 2 | 0.9200 (0.9000 to 0.9400) | 0.5000 (0.5000 to 0.5000) "
        "| 0.2500 (0.2500 to 0.2500) | 101 (200) | 10 (20) |"
    ]
    assert "| | | BM25 | | 0.6000 | 0.5000 | 0.2500 | | |" in text.splitlines()


def test_of_a_seed_that_ran_twice_the_later_run_counts():
    text = quality_tables.markdown_tables([result(0, 0.90), result(0, 0.91)])
    expected = "| listwise_ce | bm25 | ours | 1 | 0.9100 | 0.5000 | 0.2500 | 100 (200) | 10 (20) |"
    assert trained_lines(text) == [expected]


def test_rows_of_different_settings_never_share_a_table():
    text = quality_tables.markdown_tables([result(0, 0.9), result(1, 0.8, setting={"data": "toy", "lr": 1.0})])
    first, second = text.split("data toy, lr 1.0")
    assert len(trained_lines(first)) == len(trained_lines(second)) == 1


def test_ours_and_theirs_are_compared_by_query_over_common_seeds():
    theirs = [result(seed, 0.8, trainer="sentence-transformers") for seed in (0, 1)]
    text = quality_tables.markdown_tables([result(0, 0.8), result(1, 0.9), result(2, 0.1), *theirs])
    (line,) = [line for line in text.splitlines() if " - " in line]
    # each query gains (0 + 0.1) / 2; of the 8 ways to give three equal differences a sign, 2 are as far from 0
    assert line == (
        "listwise_ce/bm25/ours - listwise_ce/bm25/sentence-transformers: "
        "ndcg@10 +0.0500, +0.0500 to +0.0500, p 0.250, 3/0/0 gained/lost/same (2 seeds)"
    )


def test_a_baseline_is_compared_with_every_other_row():
    rows = [result(0, 0.8, records="random"), result(0, 0.9), result(0, 0.7, loss="listnet", records="mined.jsonl")]
    text = quality_tables.markdown_tables(rows, "listwise_ce/random/ours")
    found = [line.split(" - ")[0] for line in text.splitlines() if " - " in line]
    assert found == ["listwise_ce/bm25/ours", "listnet/mined.jsonl/ours"]
    with pytest.raises(ValueError, match="no row is listwise_ce/none/ours; there are listnet/mined.jsonl/ours, "):
        quality_tables.markdown_tables(rows, "listwise_ce/none/ours")


# --- end to end ---


def run_quality(toy: Path, tmp_path: Path, *more: str) -> dict:
    """The row of a tiny model, as it stands in the file."""
    model = tiny_bert(tmp_path / "base")
    out = tmp_path / "rows.jsonl"
    sizes = ["--queries", "8", "--max_len", "32", "--threads", "1"]
    quality.main(["--data", str(toy), "--model", model, "--out", str(out), *sizes, *more])
    return quality_tables.read_rows(out)[-1]


def check_row(row: dict) -> None:
    for name in ("BM25", "ceiling", "trained"):
        assert set(row["figures"][name]) == {"ndcg@10", "mrr@10", "map"}
    assert row["figures"]["BM25"]["ndcg@10"] == pytest.approx(1 / math.log2(4))  # always third
    assert row["figures"]["ceiling"]["ndcg@10"] == 1
    assert 0 < row["figures"]["trained"]["ndcg@10"] <= 1
    assert row["setting"]["queries"] == 8 and row["setting"]["test_queries"] == 4
    assert sum(row["per_query"].values()) / 4 == pytest.approx(row["figures"]["trained"]["ndcg@10"], abs=1e-5)
    assert row["training"].keys() == row["scoring"].keys() == {"seconds", "cpu_seconds"}
    assert row["threads"] == 1 and row["versions"]["torch"]


def test_cpu_seconds_are_counted_beside_the_wall_time():
    def work(seconds: float) -> str:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return "done"

    result, took = quality.timed(work, 0.5)
    # a tenth for rounding, one for how the system counts
    assert result == "done" and took["cpu_seconds"] >= 0.3 and took["seconds"] >= 0.3


@pytest.fixture
def settings_restored(monkeypatch):
    import torch

    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "RAG_RETRIEVAL_CACHE"):
        monkeypatch.setenv(name, "replaced")  # monkeypatch then undoes what the benchmark sets itself
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("loss", ["point_ce", "listwise_ce"])
def test_a_row_of_ours_end_to_end(toy, tmp_path, capsys, loss):
    row = run_quality(toy, tmp_path, "--loss", loss, "--work", str(tmp_path / "work"))
    check_row(row)
    steps = [json.loads(line) for line in (tmp_path / "work/out/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 1  # 8 records of 4 pairs are one step of 32 pairs
    assert f"{loss} by ours" in capsys.readouterr().out


@pytest.mark.usefixtures("settings_restored")
def test_a_row_with_teacher_records_extra_keys_and_a_run_file(toy, tmp_path):
    taught = {"content": "a b", "label": 1, "teacher_score": 2.0}, {"content": "c", "label": 0, "teacher_score": -1.0}
    write_lines(tmp_path / "soft.jsonl", [{"query": f"q {number}", "hits": taught} for number in range(8)])
    write(tmp_path / "run.trec", "".join(f"q{number} Q0 d{number}-0 1 1.0 x\n" for number in range(8, 12)))
    options = ["--records", str(tmp_path / "soft.jsonl"), "--keys", "teacher_loss_type=margin_mse", "seed=3"]
    options += ["--candidates", str(tmp_path / "run.trec"), "--work", str(tmp_path / "work"), "--epochs", "2"]
    row = run_quality(toy, tmp_path, "--loss", "listwise_ce", *options)
    assert (row["loss"], row["records"]) == ("listwise_ce teacher_loss_type=margin_mse seed=3", "soft.jsonl")
    assert {name: values["ndcg@10"] for name, values in row["figures"].items()} == {
        "run.trec": 1, "ceiling": 1, "trained": 1,
    }  # fmt: skip
    used = (tmp_path / "work/out/training_config.yaml").read_text()
    assert "teacher_loss_type: margin_mse" in used and "seed: 3" in used and "epochs: 2" in used


def test_random_negatives_come_from_the_whole_corpus_and_are_never_relevant(toy):
    records = quality.training_records(read_folder(toy), 8, negatives=3, depth=10, seed=0, negatives_from="random")
    assert len(records) == 8
    topics = {text.split()[0] for record in records for text in record["neg"]}
    assert len(topics) > 4  # BM25's negatives are of the query's own topic
    assert all(record["pos"][0] not in record["neg"] for record in records)


@pytest.mark.slow
@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("loss", quality.THEIR_LOSSES)
def test_a_row_of_sentence_transformers_end_to_end(toy, tmp_path, loss):
    pytest.importorskip("sentence_transformers")
    row = run_quality(toy, tmp_path, "--loss", loss, "--trainer", "sentence-transformers", "--cosine")
    check_row(row)
    assert 0 < row["figures"]["base's cosine"]["ndcg@10"] <= 1


# the others differ on binary labels as tests/losses/test_sentence_transformers.py says: in ties and in the divisor
EQUAL_LOSSES = sorted({*quality.THEIR_LOSSES} - {"listmle", "position_listmle", "lambda_loss"})


@pytest.mark.slow
@pytest.mark.parametrize("loss", EQUAL_LOSSES)
def test_both_trainers_compute_the_same_loss_from_the_same_scores(tmp_path, toy, loss):
    import torch
    from sentence_transformers.cross_encoder import CrossEncoder

    from rag_retrieval.losses import LOSSES

    records = quality.training_records(read_folder(toy), count=8, negatives=3, depth=5, seed=0)
    model = CrossEncoder(tiny_bert(tmp_path / "base"), num_labels=1, max_length=32).eval()
    rows = quality_trainers.pair_rows(records)
    pairs = [(row["query"], row["document"]) for row in rows]
    scores = torch.tensor(model.predict(pairs, activation_fn=torch.nn.Identity()))
    labels = torch.tensor([row["label"] for row in rows])
    inputs, targets = [list(column) for column in zip(*pairs, strict=True)], labels
    if loss not in quality_trainers.POINTWISE:
        scores, labels = scores.view(8, 4), labels.view(8, 4)
        groups = quality_trainers.group_rows(records)
        inputs = [[row["query"] for row in groups], [row["documents"] for row in groups]]
        targets = [torch.tensor(row["labels"]) for row in groups]
    theirs = quality_trainers.sentence_transformers_loss(loss, model)(inputs, targets)
    total, count = LOSSES[loss](scores, labels)
    assert theirs.item() == pytest.approx((total / count).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d"], "--loss, --out missing"),
        (["--data", "d", "--loss", "info_nce", "--out", "o", "--trainer", "sentence-transformers"],
         "--loss info_nce: for sentence-transformers there are point_ce,"),
        (["--data", "d", "--loss", "listnet", "--out", "o", "--trainer", "sentence-transformers", "--keys", "a=1"],
         "--records and --keys are for --trainer ours"),
    ],
)
def test_a_row_that_cannot_be_made_is_refused_with_a_reason(arguments, message, capsys):
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err
