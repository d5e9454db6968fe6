"""Whole runs over small data: what is written, that it is reproducible, and what is reported."""

import json
import random
import shutil

import numpy as np
import pytest
from mining_samples import animal_data, config_of, read_output, write_beir, write_jsonl
from tiny_models import tiny_bert

from rag_retrieval.core.files import lock_file_of, locked
from rag_retrieval.data.readers import read_records
from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.data.store import open_store
from rag_retrieval.mining import miner, run
from rag_retrieval.mining.run import index_options, mine
from rag_retrieval.retrieval.encoding import encode_with, open_embedder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return animal_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("base") / "bert")


def ways(base):
    dense = {"candidates": "dense", "dense_model": base, "dense_batch_size": 8}
    return {"bm25": {}, "dense": dense, "fused": dense | {"candidates": "fused"}}


@pytest.mark.parametrize("way", ["bm25", "dense", "fused"])
def test_negatives_are_other_documents_and_every_candidate_is_counted(data, base, tmp_path, way):
    summary = mine(config_of(data, tmp_path / "out.jsonl", **ways(base)[way]))
    lines = read_output(tmp_path / "out.jsonl")
    assert [line["query"] for line in lines] == sorted(line["query"] for line in lines)
    for line in lines:
        words = line["query"].split()
        assert line["pos"] == [f"The {words[1]} lives at the {words[-1]} and sleeps."]
        assert len(set(line["neg"])) == 3 and not set(line["neg"]) & set(line["pos"])
    assert (len(lines), summary.lines, summary.queries, summary.kept) == (36, 36, 36, 108)
    assert summary.candidates == summary.kept + sum(summary.dropped.values()) == 360
    written = json.loads((tmp_path / "out.summary.json").read_text())
    assert written == summary.to_dict()
    assert [path.name for path in tmp_path.iterdir() if "work" in path.name] == []


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_the_sources_are_never_written_over(tmp_path, name):
    data = animal_data(tmp_path / "data")
    before = (data / name).read_bytes()
    with pytest.raises(ValueError, match=f"{name} is one of the sources, which would be lost"):
        mine(config_of(data, data / name, overwrite=True))
    options = {"corpus": str(data / "corpus.jsonl"), "overwrite": True}
    with pytest.raises(ValueError, match=f"{name} is one of the sources, which would be lost"):
        mine(config_of(data / "queries.jsonl", data / name, **options))
    assert (data / name).read_bytes() == before


def test_an_output_that_is_a_folder_is_refused_before_any_work(data, tmp_path):
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(ValueError, match="out.jsonl is a folder; give the name of a file"):
        mine(config_of(data, tmp_path / "out.jsonl", overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_bm25_negatives_share_the_animal_or_the_place(data, tmp_path):
    mine(config_of(data, tmp_path / "out.jsonl"))
    for line in read_output(tmp_path / "out.jsonl"):
        _, animal, *_, place = line["query"].split()
        assert all((animal in text) != (place in text) for text in line["neg"])


def test_the_window_and_the_best_of_it(data, tmp_path):
    mine(config_of(data, tmp_path / "all.jsonl", num_negatives=9, sampling="top"))
    mine(config_of(data, tmp_path / "some.jsonl", num_negatives=2, first_rank=4, sampling="top"))
    for everything, some in zip(read_output(tmp_path / "all.jsonl"), read_output(tmp_path / "some.jsonl"), strict=True):
        assert everything["neg"][2:4] == some["neg"], "rank 1 is the positive, so rank 4 is the third negative"


@pytest.mark.parametrize("way", ["bm25", "fused"])
def test_the_order_of_the_source_and_its_compression_change_nothing(data, base, tmp_path, way):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    mine(config_of(data, first, **ways(base)[way]))
    mine(config_of(animal_data(tmp_path / "other", reverse=True, compressed=True), second, **ways(base)[way]))
    assert first.read_bytes() == second.read_bytes()


def test_another_seed_draws_others(data, tmp_path):
    for seed in (0, 1):
        mine(config_of(data, tmp_path / f"{seed}.jsonl", seed=seed))
    assert (tmp_path / "0.jsonl").read_bytes() != (tmp_path / "1.jsonl").read_bytes()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("way", ["bm25", "dense"])
def test_a_killed_run_keeps_its_parts_and_continues_to_the_same_bytes(data, base, tmp_path, monkeypatch, way):
    monkeypatch.setattr(run, "PART", 10)
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    mine(config_of(data, whole, **ways(base)[way]))
    original, calls = miner.Miner._mine, []

    def mining(self, query, candidates):
        calls.append(query.text)
        if len(calls) == 25:
            raise Killed
        return original(self, query, candidates)

    monkeypatch.setattr(miner.Miner, "_mine", mining)
    config = config_of(data, resumed, **ways(base)[way])
    with pytest.raises(Killed):
        mine(config)
    assert not resumed.exists() and not (tmp_path / "resumed.summary.json").exists()
    mine(config)
    assert len(calls) == 25 + 16, "two parts of ten were kept"
    assert resumed.read_bytes() == whole.read_bytes()
    assert (tmp_path / "resumed.summary.json").read_bytes() == (tmp_path / "whole.summary.json").read_bytes()


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.partition("\n")[2]])
def test_a_damaged_part_is_named_and_mined_again_once_it_is_deleted(data, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(run, "PART", 10)
    config = config_of(data, tmp_path / "out.jsonl", work_dir=str(tmp_path / "work"))
    mine(config)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (file,) = (tmp_path / "work").glob("parts-*/shard-000002/mined.jsonl")
    file.write_text(damage(file.read_text()))
    again = config.model_copy(update={"overwrite": True})
    with pytest.raises(
        ValueError, match=f"{file}: damaged, expected a line for each of 10 queries; delete {file.parent}"
    ):
        mine(again)
    shutil.rmtree(file.parent)
    mine(again)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_kept_work_folder_serves_other_settings_and_never_other_data(data, tmp_path, monkeypatch):
    built = []
    build = run.build_index
    monkeypatch.setattr(run, "build_index", lambda *arguments: (built.append(1), build(*arguments)))
    work = {"work_dir": str(tmp_path / "work")}
    mine(config_of(data, tmp_path / "a.jsonl", **work))
    mine(config_of(data, tmp_path / "b.jsonl", num_negatives=1, **work))
    assert {len(line["neg"]) for line in read_output(tmp_path / "b.jsonl")} == {1}
    assert len(built) == 1
    other = write_beir(tmp_path / "o", {"a": "panda", "b": "panda b"}, {"q": "panda"}, [("q", "a", 1)])
    mine(config_of(other, tmp_path / "c.jsonl", **work))
    assert read_output(tmp_path / "c.jsonl")[0]["neg"] == ["panda b"] and len(built) == 2


@pytest.mark.parametrize("output_format", ["pos_neg", "hits", "pointwise"])
def test_the_trainer_s_store_holds_what_was_mined(data, tmp_path, output_format):
    summary = mine(config_of(data, tmp_path / "out.jsonl.gz", output_format=output_format))
    store = open_store(tmp_path / "out.jsonl.gz", RecordRules(exactly_one_positive=True), group_by_query=True)
    assert (store.num_groups, store.num_pairs) == (36, 36 * 4)
    assert store.positives.sum() == 36
    assert summary.lines == (144 if output_format == "pointwise" else 36)


def test_records_and_a_corpus_file_give_what_the_folder_gives(data, tmp_path):
    mine(config_of(data, tmp_path / "a.jsonl"))
    records = [
        {"query": line["query"], "pos": line["pos"], "neg": ["other"]} for line in read_output(tmp_path / "a.jsonl")
    ]
    random.Random(0).shuffle(records)
    source = write_jsonl(tmp_path / "records.jsonl", records)
    mine(config_of(source, tmp_path / "b.jsonl", corpus=str(data / "corpus.jsonl")))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_records_without_a_corpus_are_mined_among_their_own_documents(tmp_path):
    records = [
        {"query": "which panda", "pos": ["A panda eats."], "neg": ["A tiger eats.", "The panda of the zoo."]},
        {"query": "熊猫吃什么", "pos": ["熊猫吃竹子。"], "neg": ["老虎吃肉。", "A panda eats."]},
    ]
    source = write_jsonl(tmp_path / "records.jsonl", records)
    summary = mine(config_of(source, tmp_path / "out.jsonl", candidates="random", num_negatives=4))
    assert summary.documents == 5, "a text counts once"
    texts = {text for record in records for text in record["pos"] + record["neg"]}
    for line in read_output(tmp_path / "out.jsonl"):
        assert set(line["neg"]) | set(line["pos"]) == texts
    mine(config_of(source, tmp_path / "words.jsonl", num_negatives=4))
    negatives = {line["query"]: line["neg"] for line in read_output(tmp_path / "words.jsonl")}
    assert negatives["which panda"] == ["The panda of the zoo."]


def test_graded_labels_are_kept_in_hits(tmp_path):
    documents = {"a": "panda bear", "b": "panda bamboo", "c": "panda zoo", "d": "panda toy"}
    folder = write_beir(tmp_path / "d", documents, {"q": "panda"}, [("q", "a", 3), ("q", "b", 1), ("q", "c", 0)])
    mine(config_of(folder, tmp_path / "o.jsonl", output_format="hits"))
    record = next(read_records(tmp_path / "o.jsonl", RecordRules()))
    assert sorted(zip(record.documents, record.labels, strict=True)) == [
        ("panda bamboo", 1),
        ("panda bear", 3),
        ("panda toy", 0),
        ("panda zoo", 0),
    ]


def test_a_reranker_drops_what_it_scores_above_the_positive(data, model_folders, tmp_path):
    from rag_retrieval import CrossEncoder

    summary = mine(config_of(data, tmp_path / "out.jsonl", reranker=model_folders["bert"], labels="score"))
    scorer = CrossEncoder.from_pretrained(model_folders["bert"])
    lines = read_output(tmp_path / "out.jsonl")
    assert summary.dropped["margin"] > 0 and summary.short_queries + summary.empty_queries > 0
    assert len(lines) == 36 - summary.empty_queries
    for line in lines:
        assert max(line["neg_scores"]) <= line["pos_scores"][0]
        expected = scorer.compute_score([(line["query"], text) for text in line["neg"]])
        assert line["neg_scores"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_query_with_fewer_negatives_is_written_and_one_without_is_not(tmp_path):
    documents = {"a": "panda", "b": "panda bear", "c": "tiger", "d": "PANDA", "e": "otter river", "f": "otter coast"}
    queries = {"1": "panda bear", "2": "tiger", "3": "otter"}
    folder = write_beir(tmp_path / "d", documents, queries, [("1", "a", 1), ("2", "c", 1), ("3", "e", 1)])
    summary = mine(config_of(folder, tmp_path / "o.jsonl", num_negatives=1))
    assert [line["query"] for line in read_output(tmp_path / "o.jsonl")] == ["otter"]
    assert (summary.short_queries, summary.empty_queries) == (0, 2)
    assert summary.dropped == {"positive": 3, "positive_text": 1, "query_text": 1}
    summary = mine(config_of(folder, tmp_path / "p.jsonl", num_negatives=2))
    assert (summary.short_queries, summary.empty_queries, summary.lines) == (1, 2, 1)
    text = summary.describe(2)
    assert "1  have fewer, and are written all the same" in text and "2  have none, and are not written" in text


def test_no_negative_at_all_is_an_error_with_the_reasons(tmp_path):
    folder = write_beir(tmp_path / "d", {"a": "panda", "b": "tiger"}, {"q": "panda"}, [("q", "a", 1)])
    with pytest.raises(ValueError, match=r"(?s)no query got a negative; .*1  dropped: a positive of the query"):
        mine(config_of(folder, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_is_replaced_only_on_demand(data, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="out.jsonl exists; take another output, or overwrite: true"):
        mine(config_of(data, tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    mine(config_of(data, tmp_path / "out.jsonl", overwrite=True))
    assert len(read_output(tmp_path / "out.jsonl")) == 36


def test_a_second_run_on_one_output_is_refused_whatever_its_work_folder(data, tmp_path):
    output = tmp_path / "out.jsonl"
    with locked(lock_file_of(output), "busy"), pytest.raises(ValueError, match=f"another.*{output}"):
        mine(config_of(data, output, work_dir=str(tmp_path / "elsewhere")))
    assert not list(tmp_path.glob("out*")), "nothing is written"


def test_missing_data_are_reported(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        mine(config_of(tmp_path / "nowhere", tmp_path / "out.jsonl"))
    source = write_jsonl(tmp_path / "r.jsonl", [{"query": "q", "pos": ["a"]}])
    with pytest.raises(DataError, match="nowhere.jsonl: no such file or folder; expected"):
        mine(config_of(source, tmp_path / "out.jsonl", corpus=str(tmp_path / "nowhere.jsonl")))


def test_missing_libraries_are_named_with_the_install_command(data, tmp_path, monkeypatch):
    monkeypatch.setattr("rag_retrieval.retrieval.building.BM25_LIBRARIES", ("bm25s", "no_such_library"))
    with pytest.raises(ValueError, match=r"needs no_such_library; run: pip install -e '.\[mine\]'"):
        mine(config_of(data, tmp_path / "out.jsonl"))


def test_a_missing_device_is_reported(data, base, tmp_path):
    with pytest.raises(ValueError, match="'tpu9' is no device of torch"):
        mine(config_of(data, tmp_path / "out.jsonl", **ways(base)["dense"], device="tpu9"))
    with pytest.raises(ValueError, match="meta"):
        mine(config_of(data, tmp_path / "out.jsonl", **ways(base)["dense"], device="meta"))


def test_a_teacher_score_below_zero_is_refused_as_a_positives_label(data, tmp_path):
    mine(config_of(data, tmp_path / "a.jsonl", num_negatives=1))
    line = read_output(tmp_path / "a.jsonl")[0]
    record = {"query": line["query"], "pos": line["pos"], "pos_scores": [-0.5]}
    source, options = write_jsonl(tmp_path / "r.jsonl", [record]), {"corpus": str(data / "corpus.jsonl")}
    with pytest.raises(DataError, match="a positive has the label -0.5, and mined negatives get 0"):
        mine(config_of(source, tmp_path / "b.jsonl", output_format="hits", **options))
    assert mine(config_of(source, tmp_path / "b.jsonl", **options)).lines == 1


def test_a_window_beyond_the_corpus_is_refused(data, tmp_path):
    with pytest.raises(DataError, match="first_rank is 50, and there are 36 documents, so that no candidate can have"):
        mine(config_of(data, tmp_path / "out.jsonl", first_rank=50, last_rank=60))


def test_dense_scores_are_cosines(data, base, tmp_path):
    config = config_of(data, tmp_path / "out.jsonl", **ways(base)["dense"], vector_dtype="float32")
    mine(config)
    options = index_options(config)
    encode_queries, encode = (encode_with(open_embedder(options), kind, options) for kind in ("query", "document"))
    for line in read_output(tmp_path / "out.jsonl")[:5]:
        query, documents = encode_queries([line["query"]])[0], encode(line["pos"] + line["neg"])
        scores = line["candidate_scores"]["pos"] + line["candidate_scores"]["neg"]
        np.testing.assert_allclose(documents @ query, scores, atol=1e-5)


def test_the_summary_says_how_words_were_made_in_a_chosen_language(tmp_path):
    pytest.importorskip("Stemmer")
    for language, expected in (("auto", "english "), ("plain", "plain ")):
        config = config_of(animal_data(tmp_path / language), tmp_path / language / "out.jsonl", language=language)
        assert mine(config).words.startswith(expected)
        assert json.loads((tmp_path / language / "out.summary.json").read_text())["words"].startswith(expected)
