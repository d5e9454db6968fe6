import errno
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rag_retrieval.train import failures
from rag_retrieval.train.failures import (
    is_out_of_memory,
    peer_failure,
    steps_of,
    storage_cause,
    translate_storage_errors,
)
from rag_retrieval.train.task import ProcessFailure, TrainingError

FOLDER = Path("/")  # there, with much space


def test_the_cause_of_a_storage_error_is_recognized_through_libraries():
    cases = [
        (OSError(errno.ENOSPC, "full"), "no space left to write"),
        (OSError(errno.EFBIG, "File too large"), "no space left to write"),
        (SafetensorError("I/O error: File too large (os error 27)"), "no space left to write"),
        (OSError(errno.EROFS, "read-only"), "cannot be written to"),
        (PermissionError(errno.EACCES, "denied", "/metrics.jsonl"), "cannot be written to"),
        (OSError(errno.EIO, "bad disk"), "writing failed"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1"), "writing failed"),
    ]
    for error, cause in cases:
        assert storage_cause(error, FOLDER).startswith(cause)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ECONNREFUSED, "no tracker"),
        FileNotFoundError(errno.ENOENT, "no such file", "/elsewhere/train.jsonl"),
        RuntimeError("shapes do not fit"),
        SafetensorError("header too large"),
    ],
)
def test_other_errors_pass(error, tmp_path):
    assert storage_cause(error, tmp_path) is None
    with pytest.raises(type(error)), translate_storage_errors(tmp_path):
        raise error


def test_a_missing_folder_is_reported_whatever_the_error(tmp_path):
    assert "the folder is gone" in storage_cause(RuntimeError("Parent directory /x does not exist."), tmp_path / "gone")
    error = FileNotFoundError(errno.ENOENT, "no such file", str(tmp_path / "gone" / "metrics.jsonl"))
    assert "the folder is gone" in storage_cause(error, tmp_path / "gone")


def test_a_training_error_is_not_translated_again(tmp_path):
    with pytest.raises(TrainingError) as caught, translate_storage_errors(tmp_path):
        raise TrainingError("inline_container")
    assert not isinstance(caught.value, ProcessFailure)


def test_out_of_memory_is_distinguished_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_lost_peer_is_distinguished_from_other_errors():
    assert "has ended" in peer_failure(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:10917."), 30)
    silent = RuntimeError("[unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete")
    assert "0.1 minutes (wait_minutes)" in peer_failure(silent, 0.1)
    for error in (RuntimeError("shapes do not fit"), ConnectionResetError("wandb")):
        assert peer_failure(error, 30) is None


class BrokenLoader:
    """Has one process, which lives so many seconds, and an error instead of a step."""

    num_workers = 1

    def __init__(self, seconds: float, error: Exception):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,), daemon=True)
        process.start()
        if not seconds:
            process.join(60)
        self._workers, self.error = [process], error

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error

    def _shutdown_workers(self):
        self._workers[0].kill()
        self._workers[0].join()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "gone")])
def test_an_error_is_a_worker_death_only_where_a_worker_has_died(error, monkeypatch):
    with pytest.raises(ProcessFailure, match="num_workers"):
        next(steps_of(BrokenLoader(0, error)))
    monkeypatch.setattr(failures, "DEATH_SECONDS", 0.1)
    living = BrokenLoader(300, error)
    with pytest.raises(type(error)):
        next(steps_of(living))
    assert not living._workers[0].is_alive()
