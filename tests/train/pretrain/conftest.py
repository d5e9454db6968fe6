"""Texts and settings for tests of pre-training."""

import pytest
from training_runs import plain_texts, write_jsonl


@pytest.fixture(scope="module")
def settings(tmp_path_factory, bert):
    """Keys of a small run: 40 passages, 8 to a step, so 5 optimizer steps an epoch. Change them at will."""
    folder = tmp_path_factory.mktemp("settings")

    def make(rows: list[dict] | None = None, **changes) -> dict:
        values = {
            "task": "pretrain",
            "model_name_or_path": bert,
            "max_len": 48,
            "train_dataset": write_jsonl(folder / "train.jsonl", rows or plain_texts(40)),
            "output_dir": str(folder / "run"),
            "overwrite_output_dir": True,
            "batch_size": 8,
            "lr": 1e-3,
            "adam_epsilon": 1e-3,  # Adam divides rounding noise by itself where a gradient is zero: key biases
            "num_workers": 0,
            "log_interval": 1,
            "save_on_epoch_end": False,
        }
        return values | changes

    return make
