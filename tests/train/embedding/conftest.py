"""Settings for tests of embedding runs."""

import pytest
from training_runs import embedding_records, write_jsonl


@pytest.fixture
def settings(tmp_path, bert):
    """Keys of a small run: 40 records, 8 to a step, so 5 optimizer steps an epoch. Change them at will."""

    def make(records: list[dict] | None = None, **changes) -> dict:
        values = {
            "task": "embedding",
            "model_name_or_path": bert,
            "query_max_len": 24,
            "passage_max_len": 48,
            "train_dataset": write_jsonl(tmp_path / "train.jsonl", records or embedding_records(40)),
            "loss_type": "info_nce",
            "temperature": 0.05,
            "output_dir": str(tmp_path / "run"),
            "batch_size": 8,
            "lr": 1e-3,
            "num_workers": 0,
            "log_interval": 1,
            "save_on_epoch_end": False,
        }
        return values | changes

    return make
