"""Models and settings for tests of the trainer."""

import pytest
from tiny_models import tiny_bert, tiny_qwen2
from training_runs import grouped_records, pointwise_records, without_dropout, write_jsonl

from rag_retrieval.models import cpu_products


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    """A BERT without dropout and without a head."""
    return without_dropout(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="session")
def bert_with_dropout(tmp_path_factory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert-dropout"))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> str:
    return tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module", autouse=True)
def products_of_torch():
    """Runs here multiply as those of engine_runs.py, and the same on every processor. Tests of oneDNN ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_products, "onednn_is_faster", lambda: False)
        yield


@pytest.fixture
def settings(tmp_path, bert):
    """Keys of a small run: 20 groups, batches of 4, so 5 optimizer steps an epoch. Change them at will."""

    def make(loss_type: str = "listwise_ce", records: list[dict] | None = None, **changes) -> dict:
        grouped = not loss_type.startswith("point")
        if records is None:
            records = grouped_records(20) if grouped else pointwise_records(40)
        values = {
            "model_name_or_path": bert,
            "model_type": "bert_encoder",
            "max_len": 48,
            "train_dataset": write_jsonl(tmp_path / "train.jsonl", records),
            "train_dataset_type": "grouped" if grouped else "pointwise",
            "loss_type": loss_type,
            "output_dir": str(tmp_path / "run"),
            "batch_size": 4 if grouped else 8,
            "lr": 1e-3,
            "num_workers": 0,
            "log_interval": 1,
            "save_on_epoch_end": False,
        }
        return values | changes

    return make
