import sys
from pathlib import Path

import pytest
from index_samples import m3_folder
from mining_samples import animal_data
from tiny_models import tiny_bert

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import token_index  # noqa: E402


@pytest.mark.parametrize("make, width", [(m3_folder, 16), (lambda folder: tiny_bert(folder / "bert"), 8)])
def test_every_way_to_keep_token_vectors_is_measured(tmp_path, monkeypatch, capsys, make, width):
    monkeypatch.setattr(token_index, "PRECISIONS", ("float32", "residual2"))
    monkeypatch.setattr(token_index, "DEPTH", 10)
    data = animal_data(tmp_path / "data")
    options = ["--data", str(data), "--split", "train", "--work", str(tmp_path / "work"), "--colbert_dim", str(width)]
    token_index.main([*options, "--model", make(tmp_path)])
    printed = capsys.readouterr().out.partition("\n36 documents of ")[2].splitlines()
    assert " 36 queries of " in printed[0]
    table = [line.split() for line in printed[2:]]
    assert [row[:2] for row in table] == [[kept, candidates] for kept in ("float32", "residual2")
                                          for candidates in ("all", "tokens")]  # fmt: skip
    exact, _, codes, _ = table
    assert exact[2] == str(4 * width) and codes[2] == str(4 + width // 4) and exact[4] == "1.000"
    assert all(0 <= float(value) <= 1 for row in table for value in row[4:7])
