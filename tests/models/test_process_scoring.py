"""Two processes of one group score as one does, to the last digit, and an error of one is an error of both."""

import pytest
import torch
import torch.multiprocessing
from pair_samples import some_pairs
from scoring_processes import run

from rag_retrieval.models import scoring
from rag_retrieval.models.process_scoring import score_over_processes


def test_alone_it_is_compute_score(load_tiny):
    scorer, pairs = load_tiny("bert"), some_pairs(12)
    options = {"batch_size": 5, "max_length": 40, "normalize": True, "precision": "bf16"}
    assert torch.equal(score_over_processes(scorer, pairs, **options), scorer.compute_score(pairs, **options))


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folders) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("group"))
    torch.multiprocessing.spawn(run, args=(2, model_folders["bert"], folder), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_every_process_gets_the_scores_of_one_process_to_the_last_digit(found, load_tiny, monkeypatch):
    scorer, pairs = load_tiny("bert"), some_pairs(60)
    whole = scorer.compute_score(pairs)
    monkeypatch.setattr(scoring, "CHUNK_TEXTS", 25)
    cut = scorer.compute_score(pairs, batch_size=7, max_length=40, normalize=True)
    for process in found:
        assert torch.equal(process["one chunk"], whole)
        assert torch.equal(process["chunks"], cut)
        assert torch.equal(process["one pair"], scorer.compute_score(pairs[0]))
        assert process["none"].shape == (0,)


@pytest.mark.slow
def test_each_pair_is_scored_on_one_process_and_both_have_work(found):
    first, second = (sum(process["forwards"]) for process in found)
    assert first + second == 60 and min(first, second) > 20


@pytest.mark.slow
def test_pairs_or_options_that_differ_are_refused_on_every_process(found):
    for process in found:
        assert process["lengths"].startswith("ValueError: every process must pass the same")
        assert "process 0 has 9 texts" in process["lengths"] and "process 1 has 10 texts" in process["lengths"]
        assert process["texts"].startswith("ValueError") and process["texts"].endswith("other texts")
        assert process["options"].startswith("ValueError") and "batch_size=6" in process["options"]


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_on_every_one(found):
    assert found[0]["failure"].endswith("the work failed on process 1: RuntimeError: this process fails")
    assert found[1]["failure"] == "RuntimeError: this process fails"
    assert "failed on process 1: ValueError: pairs[60]: the document must be a string" in found[0]["one bad"]
    assert found[1]["one bad"].startswith("ValueError: pairs[60]: the document must be a string")


@pytest.mark.slow
def test_an_error_while_planning_is_raised_on_every_process(found):
    """Only the first plans; the others would wait for its plan."""
    assert found[0]["planning"] == "RuntimeError: this process fails"
    assert found[1]["planning"].endswith("process 0: RuntimeError: this process fails")


@pytest.mark.slow
def test_equal_pairs_tie_over_processes(found, load_tiny):
    for process in found:
        assert torch.equal(process["repeated"][::2], process["repeated"][1::2])
        expected = load_tiny("bert").compute_score(some_pairs(60)[:20])
        torch.testing.assert_close(process["repeated"][::2], expected, atol=1e-5, rtol=0)
