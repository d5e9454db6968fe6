"""Two processes of one group validate as one does, to the last digit."""

import numpy as np
import pytest
import torch
import torch.multiprocessing
from beir_samples import write_toy
from validation_processes import run, validated

from rag_retrieval.train.embedding import shared_encoding


@pytest.mark.slow
def test_two_processes_get_the_vectors_and_figures_of_one(tmp_path, bert, monkeypatch):
    monkeypatch.setattr(shared_encoding, "BLOCK", 16)  # set by `validated`, and put back after the test
    monkeypatch.setattr(shared_encoding, "GATHERED", 5)
    write_toy(tmp_path / "toy")
    alone = validated(bert, tmp_path / "toy")
    torch.multiprocessing.spawn(run, args=(2, bert, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert alone["values"]["queries"] == 8 and 0 < alone["values"]["ndcg@10"] < 1
    for process in found:
        assert process["values"] == alone["values"]
    for vectors, expected in zip(found[0]["vectors"], alone["vectors"], strict=True):
        np.testing.assert_array_equal(vectors, expected)
    assert found[1]["vectors"] is None, "one copy is enough"
    assert found[0]["forwards"] == found[1]["forwards"], "as FSDP and ZeRO-3 need it"
    assert found[0]["own"] + found[1]["own"] == alone["own"] and min(each["own"] for each in found) > 20
