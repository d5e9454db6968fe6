"""The loop with a toy task: linear regression through dropout. Rerankers are in tests/train/reranker."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from training_runs import read_metrics

from rag_retrieval.core.signals import TrainingStopped
from rag_retrieval.train.checkpoints import TrainState, read_state
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.optim import warmup_stable_cosine
from rag_retrieval.train.resume import claim, plan_start
from rag_retrieval.train.run_folder import Provenance
from rag_retrieval.train.steps import CarriedSteps, MixedSteps, StepShape
from rag_retrieval.train.task import ProcessFailure, StepLoss, TrainingError, weighted_sum

FEATURES = 3
ORIGIN = Provenance({"lr": 0.05, "batch_size": 4}, {}, "DDP", 1, {})


@dataclass
class Numbers:
    inputs: torch.Tensor
    targets: torch.Tensor
    items: tuple[int, ...]
    size: int
    sources: list[str] = field(default_factory=list)
    part: str = ""

    def to(self, device):
        return self

    def pin_memory(self):
        return self


class ToySteps(Dataset):
    def __init__(self, records: int, batch_size: int, accumulation: int):
        self.shape = StepShape(records, batch_size, accumulation)
        numbers = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(records, FEATURES, generator=numbers)
        self.targets = torch.randn(records, 1, generator=numbers)

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps_per_epoch

    def __getitem__(self, position):
        return [
            Numbers(
                self.inputs[list(places)],
                self.targets[list(places)],
                (len(places),),
                len(places),
                [f"toy:{place + 1}" for place in places],
            )
            for places in self.shape.positions(position[1])
        ]


class ToyTask:
    """`metrics` are handed out one by one, evaluation by evaluation."""

    unit, memory_advice = "pairs", "Lower max_tokens_per_batch or batch_size, or set gradient_checkpointing true."

    def __init__(self, model: nn.Module, metrics: list[float] = ()):
        self.model, self.metrics = model, list(metrics)
        self.modes = []

    def losses(self, model, micro_batches, factors, step):
        for batch in micro_batches:
            sums = (model(batch.inputs) - batch.targets).square().sum()[None]
            yield StepLoss(weighted_sum(sums, factors), sums.detach())

    def describe_batch(self, micro_batch):
        return f"{micro_batch.size} numbers"

    def report(self, step, total_steps):
        return {}

    def evaluate(self, model, step):
        self.modes.append((model.training, torch.is_grad_enabled()))
        return {"loss": self.metrics[0], "ndcg@10": self.metrics.pop(0)}

    def save_model(self, folder: Path, state_dict):
        folder.mkdir(exist_ok=True)
        torch.save(state_dict, folder / "weights")

    def load_model(self, folder: Path):
        self.model.load_state_dict(torch.load(folder / "weights"))

    def export(self, folder: Path, results: Path):
        shutil.copytree(folder, results / "model")


def configured(output_dir: Path, **changes) -> TrainingConfig:
    values = dict(
        model_name_or_path="a-model",
        output_dir=str(output_dir),
        val_dataset="some-data",
        warmup_proportion=0.2,
        log_interval=1,
        num_workers=0,
        num_max_checkpoints=2,
        save_on_epoch_end=False,
    )
    return TrainingConfig(**values | changes)


def trainer(
    folder: Path,
    records=20,
    batch_size=4,
    accumulation=1,
    metrics=(),
    resume=None,
    dropout=0.0,
    carried=False,
    metric=None,
    **changes,
) -> Trainer:
    """carried: the records are those of the whole run."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(dropout), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    sets = {"": ToySteps(records, batch_size, accumulation)}
    steps = CarriedSteps(sets, changes["epochs"]) if carried else MixedSteps(sets)
    state, checkpoint = plan_start(folder, resume, overwrite=False)
    config = configured(folder, **changes)
    made = Trainer(accelerator, model, optimizer, steps, ToyTask(model, metrics), config, metric, state, ORIGIN)
    claim(folder, state)
    if checkpoint is not None:
        made.saver.load(checkpoint)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model" / "weights")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the schedule that is really used ---


@pytest.mark.parametrize(
    ("records", "batch_size", "accumulation", "epochs", "steps"),
    [
        (20, 4, 1, 1, 5),
        (21, 4, 1, 2, 12),
        (20, 4, 2, 3, 9),
        (7, 2, 4, 2, 2),
        (1, 4, 4, 5, 5),
        (33, 2, 3, 1, 6),
    ],
)
@pytest.mark.parametrize(("warmup", "stable"), [(0.2, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_each_step_runs_at_the_rate_of_the_schedule(
    tmp_path, records, batch_size, accumulation, epochs, steps, warmup, stable
):
    proportions = {"warmup_proportion": warmup, "stable_proportion": stable}
    state = trainer(tmp_path, records, batch_size, accumulation, epochs=epochs, **proportions).train()
    assert state.step == steps
    used = [line["lr"] for line in read_metrics(tmp_path, "train")]
    expected = [0.05 * warmup_stable_cosine(step, steps, warmup, stable) for step in range(steps)]
    assert used == pytest.approx(expected, rel=1e-12) and len(used) == steps


def test_an_epoch_that_ends_within_a_step_is_over_after_that_step(tmp_path):
    """7 steps of 4 records are three epochs of 9 1/3: these end at steps 2 1/3, 4 2/3 and 7."""
    state = trainer(tmp_path, 28, carried=True, epochs=3, save_on_epoch_end=True, num_max_checkpoints=9).train()
    assert state.step == 7 and state.steps_per_epoch == pytest.approx(7 / 3)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5", "checkpoint-7"}
    epochs = [line["epoch"] for line in read_metrics(tmp_path, "train")]
    assert epochs == [round(3 * step / 7, 4) for step in range(1, 8)]


def test_a_run_with_carried_steps_resumes_in_the_middle_of_one(tmp_path):
    trainer(tmp_path / "whole", 28, carried=True, epochs=3, dropout=0.1).train()
    kill_after(trainer(tmp_path / "cut", 28, carried=True, epochs=3, dropout=0.1, save_steps=4), 5)
    trainer(tmp_path / "cut", 28, carried=True, epochs=3, dropout=0.1, resume="auto").train()
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


# --- evaluation, best checkpoint, early stopping ---


def test_the_best_checkpoint_becomes_the_model(tmp_path):
    made = trainer(
        tmp_path,
        metrics=[0.1, 0.3, 0.2],
        epochs=3,
        metric="ndcg@10",
        num_max_checkpoints=1,
        save_on_epoch_end=True,
    )
    state = made.train()
    assert (state.best_metric, state.best_step, state.stale_evaluations) == (0.3, 10, 1)
    assert equal(weights(tmp_path), weights(tmp_path / "checkpoint-10"))
    assert not equal(weights(tmp_path), weights(tmp_path / "checkpoint-15"))
    assert not (tmp_path / "checkpoint-5").exists()


def test_a_lower_loss_is_better(tmp_path):
    state = trainer(tmp_path, metrics=[0.3, 0.1, 0.2], epochs=3, metric="loss").train()
    assert (state.best_metric, state.best_step) == (0.1, 10)


def test_training_stops_when_patience_ends(tmp_path, caplog):
    caplog.set_level("INFO")
    made = trainer(
        tmp_path,
        metrics=[0.5, 0.4, 0.6, 0.6, 0.5, 0.9],
        epochs=6,
        metric="ndcg@10",
        early_stopping_patience=2,
        log_interval=100,
    )
    state = made.train()
    assert (state.step, state.best_step, state.stale_evaluations) == (25, 15, 2)
    assert "early stop: ndcg@10 has not improved on step 15 in 2 evaluations" in caplog.text
    assert equal(weights(tmp_path), weights(tmp_path / "checkpoint-15"))
    assert [line["step"] for line in read_metrics(tmp_path, "train")] == [5, 10, 15, 20, 25]


def test_evaluations_come_every_so_many_steps_and_at_the_end(tmp_path):
    made = trainer(
        tmp_path, metrics=[0.0, 0.1, 0.2, 0.3], eval_steps=2, eval_on_start=True, metric="ndcg@10"
    )
    state = made.train()
    assert [line["step"] for line in read_metrics(tmp_path, "eval")] == [0, 2, 4, 5]
    assert made.task.modes == [(False, False)] * 4 and made.model.training
    assert state.best_step == 5


def test_an_evaluation_before_the_first_step_is_never_the_best(tmp_path):
    metrics = [0.9, 0.2]
    made = trainer(tmp_path, metrics=metrics, eval_on_start=True, metric="ndcg@10")
    assert made.train().best_step == 5


# --- checkpoints and resuming ---


def test_checkpoints_come_by_steps_and_by_epochs_once_each(tmp_path):
    made = trainer(tmp_path, epochs=2, save_steps=5, save_on_epoch_end=True, num_max_checkpoints=9)
    made.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10"}


class Killed(Exception):
    pass


def kill_after(made: Trainer, step: int) -> None:
    """Run until `step` is done, as a process that dies then."""
    take_step = made.train_step

    def step_and_die(micro_batches):
        if made.state.step == step:
            raise Killed
        take_step(micro_batches)

    made.train_step = step_and_die
    with pytest.raises(Killed):
        made.train()


def without_speed(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]


@pytest.mark.parametrize("killed_after", [4, 6, 7, 9])
@pytest.mark.parametrize(("accumulation", "num_workers"), [(1, 0), (2, 2)])
def test_a_resumed_run_has_the_bits_and_log_of_one_never_stopped(tmp_path, killed_after, accumulation, num_workers):
    run = dict(
        records=20 * accumulation - 3,
        accumulation=accumulation,
        dropout=0.3,
        epochs=2,
        save_steps=3,
        log_interval=2,
        num_workers=num_workers,
        metric="ndcg@10",
    )
    whole = trainer(tmp_path / "whole", metrics=[0.1, 0.2], **run).train()
    kill_after(trainer(tmp_path / "cut", metrics=[0.1, 0.2], **run), killed_after)
    made = trainer(tmp_path / "cut", resume="auto", **run)
    assert made.state.step == {4: 3, 6: 6, 7: 6, 9: 9}[killed_after]
    made.task.metrics = [0.1, 0.2][made.state.step // 5 :]
    state = made.train()
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert without_speed(tmp_path / "cut") == without_speed(tmp_path / "whole")
    assert (state.step, state.best_step) == (whole.step, whole.best_step) == (10, 10)


def test_a_resume_with_other_steps_per_epoch_is_refused(tmp_path):
    kill_after(trainer(tmp_path, save_steps=2), 3)
    with pytest.raises(ValueError, match="5 optimizer steps per epoch, and this run has 10"):
        trainer(tmp_path, batch_size=2, resume="auto")


def test_a_crash_while_saving_leaves_the_earlier_checkpoint(tmp_path):
    made = trainer(tmp_path, save_steps=2)
    save_state = made.accelerator.save_state

    def fail(folder):
        save_state(folder)
        if made.state.step == 4:
            raise Killed

    made.accelerator.save_state = fail
    made.checkpoints.discard = lambda step: None  # a killed process removes nothing
    with pytest.raises(Killed):
        made.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    assert list(tmp_path.glob(".checkpoint-4*"))
    assert trainer(tmp_path, resume="auto", save_steps=2).train().step == 5
    assert not list(tmp_path.glob(".*"))


# --- stopping by a signal ---


def send_in_step(made: Trainer, step: int, *numbers: int) -> None:
    """Send signals to this process while `step` (from 1) is computed."""
    take_step = made.train_step

    def step_with_signal(micro_batches):
        for number in numbers if made.state.step == step - 1 else ():
            os.kill(os.getpid(), number)
        take_step(micro_batches)

    made.train_step = step_with_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5, 7])  # 5: the end of an epoch, where an evaluation is due
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(tmp_path, number, step):
    run = dict(dropout=0.3, epochs=2, num_workers=2, metric="ndcg@10", early_stopping_patience=2)
    metrics = [0.2, 0.1]
    trainer(tmp_path / "whole", metrics=metrics, **run).train()
    made = trainer(tmp_path / "cut", metrics=metrics, **run)
    send_in_step(made, step, number)
    with pytest.raises(TrainingStopped, match=f"stopped by {number.name} after step {step} of 10, saved in") as stop:
        made.train()
    assert stop.value.number == number and read_state(tmp_path / "cut" / f"checkpoint-{step}").step == step
    made = trainer(tmp_path / "cut", metrics=metrics[step > 5 :], resume="auto", **run)
    state = made.train()
    assert (state.step, state.best_step, made.task.metrics) == (10, 5, [])
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert [line["step"] for line in read_metrics(tmp_path / "cut", "eval")] == [5, 10]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    made = trainer(tmp_path)
    send_in_step(made, 5, signal.SIGTERM)
    assert made.train().step == 5 and (tmp_path / "model").exists()


def test_an_early_stop_holds_after_a_resume(tmp_path, monkeypatch):
    run = dict(epochs=3, metric="ndcg@10", early_stopping_patience=1, save_on_epoch_end=True)
    made = trainer(tmp_path, metrics=[0.5, 0.4], **run)

    def die():
        raise Killed

    monkeypatch.setattr(made, "_finish", die)
    with pytest.raises(Killed):
        made.train()
    state = trainer(tmp_path, metrics=[], resume="auto", **run).train()
    assert (state.step, state.best_step) == (10, 5)


# --- a folder or a memory that is full ---


def fill_disk(made: Trainer, step: int, error: Exception) -> None:
    save_state = made.accelerator.save_state

    def fail(folder):
        save_state(folder)
        if made.state.step == step:
            raise error

    made.accelerator.save_state = fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_names_the_folder_and_leaves_the_earlier_checkpoint(tmp_path, error):
    made = trainer(tmp_path, save_steps=2)
    fill_disk(made, 4, error)
    with pytest.raises(ProcessFailure, match=f"output_dir {tmp_path}: .*--resume auto"):
        made.train()
    assert {path.name for path in tmp_path.iterdir() if "checkpoint" in path.name} == {"checkpoint-2"}
    assert trainer(tmp_path, resume="auto", save_steps=2).train().step == 5


def test_an_error_that_is_not_of_the_disk_keeps_its_type(tmp_path):
    made = trainer(tmp_path, save_steps=2)
    fill_disk(made, 2, OSError(errno.ECONNREFUSED, "no tracker"))
    with pytest.raises(ConnectionRefusedError):
        made.train()


def test_a_full_disk_elsewhere_is_not_put_down_to_the_output_folder(tmp_path):
    made = trainer(tmp_path)

    def fail(model, micro_batches, factors, step):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    made.task.losses = fail
    with pytest.raises(OSError, match="No space left"):
        made.train()


@pytest.mark.parametrize("log_interval", [1, 100])  # found in writing the log, or the checkpoint
def test_a_folder_removed_during_the_run_is_named_and_not_recreated(tmp_path, log_interval):
    folder = tmp_path / "run"
    made = trainer(folder, save_steps=4, log_interval=log_interval)
    take_step = made.train_step

    def step_without_folder(micro_batches):
        if made.state.step == 2:
            shutil.rmtree(folder)
        take_step(micro_batches)

    made.train_step = step_without_folder
    with pytest.raises(ProcessFailure, match=f"output_dir {folder}: the folder is gone"):
        made.train()
    assert not folder.exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory: you tried")]
)
def test_memory_that_is_full_names_the_batch_the_settings_and_the_keys(tmp_path, error):
    made = trainer(tmp_path)

    def fail(model, micro_batches, factors, step):
        raise error
        yield

    made.task.losses = fail
    with pytest.raises(ProcessFailure) as caught:
        made.train()
    message = str(caught.value)
    assert "out of memory in step 1, at a micro-batch of 4 numbers; settings: batch_size 4." in message
    assert "max_tokens_per_batch" in message and "gradient_checkpointing" in message and str(error) in message


def test_memory_that_ends_in_the_update_says_so(tmp_path):
    made = trainer(tmp_path)

    def fail():
        raise torch.OutOfMemoryError("no more")

    made.optimizer.step = fail
    with pytest.raises(ProcessFailure, match="out of memory in step 1, in the optimizer's update"):
        made.train()


@pytest.mark.parametrize("inside", [True, False])  # the signal of its death comes in a step, or at any time after
def test_a_killed_data_loading_process_is_one_error(tmp_path, inside):
    made = trainer(tmp_path, records=400, num_workers=1)
    take_step = made.train_step

    def step_without_worker(micro_batches):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            if inside:
                child.join(60)
        take_step(micro_batches)

    made.train_step = step_without_worker
    with pytest.raises(ProcessFailure, match="a data loading process ended: .*lower num_workers"):
        made.train()


def test_a_data_loading_process_outlives_a_signal_that_is_sent_to_all(tmp_path):
    made = trainer(tmp_path, records=400, num_workers=1, epochs=2)
    take_step = made.train_step

    def step_with_signals(micro_batches):
        for child in multiprocessing.active_children() if made.state.step == 3 else ():
            for number in (signal.SIGINT, signal.SIGTERM):
                subprocess.run(["sh", "-c", f"kill -{int(number)} {child.pid}"], check=True)
        take_step(micro_batches)

    made.train_step = step_with_signals
    assert made.train().step == 200


# --- clipping and values that are not finite ---


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    made = trainer(tmp_path, max_grad_norm=1e-3)
    made.forward_backward(made.dataset[0, 0])
    before = torch.stack([p.grad.norm() for p in made.model.parameters()]).norm()
    assert made._clip_gradients() == pytest.approx(before.item())
    after = torch.stack([p.grad.norm() for p in made.model.parameters()]).norm()
    assert before > 0.1 and after.item() == pytest.approx(1e-3, rel=1e-3)


def test_no_limit_leaves_the_gradient_alone_and_still_tells_its_norm(tmp_path):
    made = trainer(tmp_path, max_grad_norm=None)
    made.forward_backward(made.dataset[0, 0])
    before = [p.grad.clone() for p in made.model.parameters()]
    assert made._clip_gradients() == pytest.approx(torch.stack([g.norm() for g in before]).norm().item())
    assert all(torch.equal(p.grad, g) for p, g in zip(made.model.parameters(), before, strict=True))


def test_a_nonfinite_loss_changes_no_weight_and_names_step_and_records(tmp_path):
    made = trainer(tmp_path, records=24, batch_size=2, accumulation=2)
    made.dataset.sets[""].targets[9] = float("nan")  # step 3, second micro-batch
    before = {}
    take_step = made.train_step

    def remember(micro_batches):
        before.update({name: value.detach().clone() for name, value in made.model.state_dict().items()})
        take_step(micro_batches)

    made.train_step = remember
    with pytest.raises(TrainingError) as caught:
        made.train()
    message = str(caught.value)
    assert "the loss of step 3 is nan" in message and "toy:9, toy:10." in message
    assert equal(before, made.model.state_dict())


def test_a_bad_step_is_reported_during_the_next_and_changes_no_weight(tmp_path):
    made = trainer(tmp_path, records=24, batch_size=2, accumulation=2, log_interval=100)
    made.dataset.sets[""].targets[9] = float("nan")  # step 3
    seen = []
    take_step = made.train_step

    def remember(micro_batches):
        seen.append({name: value.detach().clone() for name, value in made.model.state_dict().items()})
        take_step(micro_batches)

    made.train_step = remember
    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        made.train()
    assert len(seen) == 4 and not equal(seen[1], seen[2]) and equal(seen[2], seen[3])


def test_an_optimizer_without_device_skipping_is_checked_at_once(tmp_path):
    made = trainer(tmp_path, records=24, batch_size=2, accumulation=2, log_interval=100)
    made.checks.skips_on_device = False
    made.dataset.sets[""].targets[9] = float("nan")  # step 3
    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        made.train()
    assert made.state.step == 2


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    made = trainer(tmp_path)
    made.model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(TrainingError, match="the gradient norm of step 1 is"):
        made.train()
    assert equal(before, made.model.state_dict())


def test_an_engine_updating_in_backward_does_not_claim_unchanged_weights(tmp_path):
    made = trainer(tmp_path)
    made.checks.skips_on_device, made.checks.updates_in_backward = False, True
    made.model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="the weights in memory were changed by it and are not saved"):
        made.train()


def test_a_finished_run_is_marked(tmp_path):
    state = trainer(tmp_path, save_on_epoch_end=True).train()
    assert plan_start(tmp_path, "auto", overwrite=False) is None
    assert read_state(tmp_path / "checkpoint-5") == TrainState(state.run_id, 5, 5)
    assert not list(tmp_path.glob(".*"))
