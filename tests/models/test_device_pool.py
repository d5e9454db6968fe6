"""Scoring on several devices: same scores, weights that change are seen, and a process that fails is an error.

Processes take seconds to start, so tests share one pool where they can and are slow where they cannot.
"""

import copy
import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from pair_samples import some_pairs

from rag_retrieval.models import device_pool
from rag_retrieval.models.device_pool import pool_for, tasks_of, weights_of
from rag_retrieval.models.devices import check_devices
from rag_retrieval.models.scoring import ScoringOptions

TWO = ["cpu", "cpu"]


def processes_of(scorer):
    return [worker.process for worker in scorer._device_pool.workers]


@pytest.fixture(scope="module")
def pooled(load_tiny):
    """A scorer whose processes run already; a test that ends them or changes the model makes its own."""
    scorer = load_tiny("bert")
    scorer.compute_score([("water", "boils")], devices=TWO)
    yield scorer
    scorer.close()


@pytest.mark.parametrize("count", [0, 1, 3, 150])
def test_two_processes_give_the_scores_of_one_in_input_order(pooled, count):
    pairs = some_pairs(150)[:count]
    torch.testing.assert_close(pooled.compute_score(pairs, devices=TWO), pooled.compute_score(pairs), atol=1e-5, rtol=0)


def test_the_processes_stay_for_further_calls_and_take_their_options(pooled, monkeypatch):
    monkeypatch.setattr(device_pool, "SMALLEST_TASK", 1)  # many tasks for each
    before = [process.pid for process in processes_of(pooled)]
    pairs = some_pairs(50)
    for options in ({"max_length": 30}, {"normalize": True}, {"precision": "bf16"}, {"batch_size": 2}):
        scores = pooled.compute_score(pairs, devices=TWO, **options)
        # bfloat16 sums of other shapes round otherwise
        tolerance = 0.1 if "precision" in options else 1e-5
        torch.testing.assert_close(scores, pooled.compute_score(pairs, **options), atol=tolerance, rtol=0)
    assert not torch.equal(scores, pooled.compute_score(pairs, devices=TWO, precision="bf16"))
    assert [process.pid for process in processes_of(pooled)] == before


def test_both_processes_are_given_work(pooled, monkeypatch):
    monkeypatch.setattr(device_pool, "SMALLEST_TASK", 1)
    dealt = {}
    result = device_pool.Worker.result

    def noting(worker):
        dealt[worker.process.pid] = dealt.get(worker.process.pid, 0) + 1
        return result(worker)

    monkeypatch.setattr(device_pool.Worker, "result", noting)
    pooled.compute_score(some_pairs(64), devices=TWO)
    assert len(dealt) == 2 and sum(dealt.values()) == 16


def test_the_progress_bar_counts_what_other_processes_scored(pooled, capsys):
    pooled.compute_score(some_pairs(70), devices=TWO, show_progress_bar=True)
    assert "70/70" in capsys.readouterr().err


def test_a_copy_has_no_processes_and_leaves_those_of_the_original(pooled):
    assert copy.deepcopy(pooled)._device_pool is None
    assert all(process.is_alive() for process in processes_of(pooled))


@pytest.mark.slow
def test_a_process_that_dies_is_one_error_and_the_next_call_starts_new_ones(load_tiny):
    scorer, pairs = load_tiny("bert"), some_pairs(70)
    scorer.compute_score(pairs, devices=TWO)
    first = processes_of(scorer)
    os.kill(first[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the process for cpu ended by signal 9 while scoring"):
        scorer.compute_score(pairs, devices=TWO)
    assert not any(process.is_alive() for process in first)
    torch.testing.assert_close(scorer.compute_score(pairs, devices=TWO), scorer.compute_score(pairs))
    second = processes_of(scorer)
    with pytest.raises(RuntimeError, match="(?s)the process for cpu failed:.*max_length 4 is too small"):
        scorer._device_pool.score(pairs, ScoringOptions(max_length=4), device_pool.tqdm(disable=True))
    assert not any(process.is_alive() for process in second)


@pytest.mark.slow
def test_weights_trained_between_two_calls_are_those_that_score(load_tiny):
    scorer, pairs = load_tiny("bert"), some_pairs(70)
    before = scorer.compute_score(pairs, devices=TWO)
    first = processes_of(scorer)
    with torch.no_grad():
        scorer.model.classifier.weight.mul_(2)
    after = scorer.compute_score(pairs, devices=TWO)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, scorer.compute_score(pairs), atol=1e-5, rtol=0)
    second = processes_of(scorer)
    assert not any(process.is_alive() for process in first), "the old processes are left over"
    del scorer
    gc.collect()
    assert not any(process.is_alive() for process in second), "they outlive the scorer"


def fused_step(scorer):
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-5, fused=True)
    for parameter in scorer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def write_one_through_data(scorer):
    scorer.model.classifier.weight.data[0, 0] += 0.01


def change_in_place(scorer):
    with torch.no_grad():
        scorer.model.classifier.weight.neg_()


def load(scorer):
    scorer.load_state_dict({name: value.clone() for name, value in scorer.state_dict().items()})


@pytest.mark.parametrize("change", [fused_step, write_one_through_data, change_in_place, load])
def test_every_way_to_write_weights_is_noticed(load_tiny, change):
    scorer = load_tiny("bert")
    before = weights_of(scorer)
    scorer.compute_score(some_pairs(5))
    assert weights_of(scorer) == before, "scoring is no change"
    change(scorer)
    assert weights_of(scorer) != before


def test_a_pool_serves_its_own_devices_weights_and_encoder_alone(pooled, load_tiny):
    pool, cpu = pooled._device_pool, torch.device("cpu")
    weights = weights_of(pooled)
    assert pool_for(pooled, [cpu, cpu], pool) is pool
    assert not pool.serves(pooled, [cpu], weights)
    assert not pool.serves(pooled, [cpu, cpu], weights[1:])
    assert not pool.serves(load_tiny("bert"), [cpu, cpu], weights)


def test_the_own_device_alone_needs_no_process(load_tiny):
    scorer, pairs = load_tiny("bert"), some_pairs(5)
    assert torch.equal(scorer.compute_score(pairs, devices=["cpu"]), scorer.compute_score(pairs))
    assert scorer._device_pool is None
    scorer.close()


@pytest.mark.parametrize(
    "devices,message",
    [
        ("cuda:0", "devices must be a list such as .* found 'cuda:0'"),
        ([], "devices must be a list"),
        (["cpu", "gpu:1"], "'gpu:1' is no device of torch"),
        (["cpu", None], "None is no device of torch"),
        (["cpu", "cuda:99"], "cuda:99 is not on this machine, which has [0-9]+ CUDA devices"),
    ],
)
def test_devices_that_cannot_be_are_refused(load_tiny, devices, message):
    with pytest.raises(ValueError, match=message):
        check_devices(devices)
    with pytest.raises(ValueError, match=message):
        load_tiny("bert").compute_score(["a", "b"], devices=devices)


def test_options_are_checked_before_a_process_starts(load_tiny):
    scorer = load_tiny("bert")
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU"):
        scorer.compute_score(["a", "b"], devices=TWO, precision="fp16")
    with pytest.raises(ValueError, match="max_length 4 is too small"):
        scorer.compute_score(["a", "b"], devices=TWO, max_length=4)
    assert scorer._device_pool is None


def test_tasks_hold_every_pair_once_longest_first_and_are_neither_tiny_nor_huge(monkeypatch):
    pairs = [("q", "d" * length) for length in (3, 9, 1, 9, 5)]
    assert tasks_of(pairs, 2) == [[1, 3, 4, 0, 2]]
    monkeypatch.setattr(device_pool, "SMALLEST_TASK", 2)
    assert tasks_of(pairs, 2) == [[1, 3], [4, 0], [2]]
    assert tasks_of([], 2) == []
    sizes = [len(task) for task in tasks_of([("q", "d")] * 1600, 2)]
    assert sizes == [100] * 16
    assert max(len(task) for task in tasks_of([("q", "d")] * 200_000, 2)) == 4096


SCRIPT = """
from rag_retrieval import CrossEncoder
def main():
    print(CrossEncoder.from_pretrained({folder!r}).compute_score(["a", "b"], devices=["cpu", "cpu"]).shape)
"""


def run_script(tmp_path, folder: str, last_lines: str) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT.format(folder=folder) + last_lines)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_guarded_script_scores_and_ends(tmp_path, model_folders):
    start = time.monotonic()
    done = run_script(tmp_path, model_folders["bert"], 'if __name__ == "__main__":\n    main()\n')
    assert done.returncode == 0 and "torch.Size([1])" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - start < 100


@pytest.mark.slow
def test_a_script_without_the_guard_is_told_of_it(tmp_path, model_folders):
    done = run_script(tmp_path, model_folders["bert"], "main()\n")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ended with exit code 1 before it was ready" in last and 'if __name__ == "__main__":' in last
