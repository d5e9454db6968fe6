import json
import logging
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from rag_retrieval.train.tracking import LogWindow, MetricsFile, Tracking

VALUES = {"epoch": 0.5, "loss": 0.25, "lr": 1e-4, "pairs_per_second": 1000.0}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_window_gives_the_mean_loss_and_the_last_rate_and_norm():
    before = time.monotonic()
    window = LogWindow(2, "pairs")
    window.started -= 10
    window.pause(5)
    window.add(loss=1.0, norm=3.0, size=40, lr=0.1)
    window.add(loss=2.0, norm=4.0, size=60, lr=0.2)
    values = window.values()
    assert 100 * 2 / (5 + time.monotonic() - before) <= values["pairs_per_second"] <= 100 * 2 / 5
    assert {**values, "pairs_per_second": 0} == {
        "loss": 1.5,
        "lr": 0.2,
        "grad_norm": 4.0,
        "pairs_per_second": 0,
    }


def test_steps_skipped_by_the_scaler_are_counted_without_their_norm():
    window = LogWindow(1, "pairs")
    window.add(1.0, 3.0, 1, 0.1)
    window.add(1.0, float("inf"), 1, 0.1)
    assert window.values()["skipped_steps"] == 1 and "grad_norm" not in window.values()


def test_an_engine_that_tells_no_norm_has_none_in_the_log():
    window = LogWindow(1, "pairs")
    window.add(1.0, None, 1, 0.1)
    assert "grad_norm" not in window.values() and "skipped_steps" not in window.values()


def test_several_data_sets_have_a_mean_loss_each_beside_that_of_all():
    window = LogWindow(1, "pairs")
    for loss, part in ((1.0, "a"), (2.0, "b"), (4.0, "a")):
        window.add(loss, None, 1, 0.1, part)
    values = {name: value for name, value in window.values().items() if name.startswith("loss")}
    assert values == {"loss": 7 / 3, "loss/a": 2.5, "loss/b": 2.0}


def test_metrics_after_the_resumed_step_are_cut_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n{"step": 5, "lo')
    MetricsFile(path, resumed_step=3).write({"step": 4, "new": True})
    assert lines(tmp_path) == [{"step": 0}, {"step": 2}, {"step": 4, "new": True}]


def test_a_new_run_begins_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    assert lines(tmp_path) == []


def tracking(folder: Path, log_with=None, run_config=None) -> Tracking:
    project = ProjectConfiguration(str(folder), str(folder / "tracking"))
    accelerator = Accelerator(cpu=True, log_with=log_with, project_config=project)
    return Tracking(accelerator, folder, total_steps=100, done=0, run_config=run_config or {}, unit="pairs")


def test_without_a_terminal_there_are_log_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made = tracking(tmp_path)
    made.progress.started -= 6000  # ten steps in it leave 15 hours
    for _ in range(10):
        made.step_done()
    made.train(10, VALUES)
    assert caplog.messages[-1].startswith("step 10/100  loss 0.2500  lr 1.00e-04  1000 pairs/s  15:")
    made.train(10, VALUES | {"loss/a": 0.5, "chance_loss/a": 0.7})
    assert caplog.messages[-1].startswith("step 10/100  loss 0.2500  loss/a 0.5000  lr 1.00e-04")
    made.evaluation(10, {"loss": 0.5, "ndcg@10": 0.75, "queries": 10}, "  (best ndcg@10 so far)")
    assert (
        caplog.messages[-1] == "evaluation at step 10: loss 0.5000  ndcg@10 0.7500  queries 10  (best ndcg@10 so far)"
    )
    made.close()
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "train", "eval"]
    assert lines(tmp_path)[0] == {"step": 10, "kind": "train", **VALUES}


def test_tensorboard_gets_values_and_a_configuration_with_none_and_lists(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"lr": 1e-4, "seed": 1, "resume": None, "lora_target_modules": ["q", "v"], "shuffle": False}
    made = tracking(tmp_path, "tensorboard", config)
    made.train(10, VALUES)
    made.evaluation(10, {"loss": 0.5}, "")
    made.close()
    events = EventAccumulator(str(tmp_path / "tracking" / "rag_retrieval"))
    events.Reload()
    assert events.Tags()["scalars"] == [*(f"train/{name}" for name in VALUES), "eval/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.25)]


@pytest.mark.slow
def test_wandb_records_offline_without_an_account(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    made = tracking(tmp_path, "wandb", {"lr": 1e-4, "resume": None, "names": ["q"]})
    made.train(10, VALUES)
    made.close()
    (run,) = (tmp_path / "tracking" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
