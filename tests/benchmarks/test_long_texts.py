import json
import sys
from pathlib import Path

import pytest
from beir_samples import write_lines, write_toy
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import long_texts
from mixed_lengths import with_positions
from quality_tables import read_rows
from transformers import AutoTokenizer

from rag_retrieval.data.beir import read_folder


@pytest.fixture
def folder(tmp_path):
    """Of twelve documents ten are long: of 80 words, at the end what is asked for."""
    toy = write_toy(tmp_path / "toy")
    documents = [
        {"_id": f"d{number}-0", "title": "", "text": "a text of it " * (20 if number > 1 else 2) + f"apple {number}"}
        for number in range(12)
    ]
    write_lines(toy / "corpus.jsonl", documents)
    return toy


def test_slices_hold_every_token_of_a_text_once(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path / "bert"))
    text = "where is a text of it , is it"
    (parts,) = long_texts.slices_of([text], tokenizer, 7)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert "".join(parts) == text and max(map(len, ids)) <= 7 and len(ids) == 3
    assert sum(ids, []) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert long_texts.slices_of(["", "is"], tokenizer, 3) == [[""], ["is"]]


def test_half_of_the_queries_for_long_documents_train_and_the_others_search_all_of_these(folder, tmp_path):
    documents = long_texts.long_documents(read_folder(folder), tiny_bert(tmp_path / "bert"), 40)
    assert set(documents) == {f"d{number}-0" for number in range(2, 12)}
    records, collection = long_texts.halves(read_folder(folder), documents, seed=0)
    asked = {record["query"] for record in records}
    assert len(asked) == len(collection.queries) == 5 and not asked & set(collection.queries.values())
    assert set(collection.documents) == set(documents), "of both halves"
    assert all(grades == {query.replace("q", "d") + "-0": 1} for query, grades in collection.qrels.items())


@pytest.mark.slow
def test_every_training_is_read_in_its_ways(folder, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--data", str(folder), "--model", tiny_bert(tmp_path / "bert"), "--out", str(out), "--threads", "1"]
    arguments += ["--least", "40", "--short", "32", "--most", "1024"]
    arguments += ["--epochs", "1", "--batch_size", "4", "--lr", "0.01"]
    long_texts.main([*arguments, "--precision", "no", "--encode-dtype", "fp32", "--work", str(tmp_path / "work")])
    rows = read_rows(out)
    assert [(row["trained"], row["read"]) for row in rows] == [
        (name, reading) for name, (_, readings) in long_texts.TRAININGS.items() for reading in readings
    ]
    assert len({json.dumps(row["figures"]) for row in rows}) > 3
    configurations = [(tmp_path / "work" / number / "training.yaml").read_text() for number in ("3", "9")]
    assert "passage_max_len: 32\n" in configurations[0] and "cls_interval" not in configurations[0]
    assert "passage_max_len: 1024\n" in configurations[1] and "cls_interval: 256\n" in configurations[1]
    assert capsys.readouterr().out.count(" - base, read truncated: ndcg@10 ") == len(rows) - 1


def test_positions_are_repeated(tmp_path):
    model = with_positions(tiny_bert(tmp_path / "bert"), 1100)
    weight = model.model.embeddings.position_embeddings.weight
    own = len(weight) - 2 * 512
    assert weight.shape[0] == 1100 and weight[512:1024].equal(weight[:512]) and weight[1024:].equal(weight[:own])
