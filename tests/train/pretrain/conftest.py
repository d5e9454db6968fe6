"""Texts and settings for tests of pre-training."""

import pytest
from tiny_models import bert_tokenizer, save_tiny
from training_runs import plain_texts, write_jsonl
from transformers import ModernBertConfig


@pytest.fixture(scope="session")
def modernbert(tmp_path_factory) -> str:
    """A family that names its embeddings among the modules which FSDP wraps; its positions have no table."""
    tokenizer = bert_tokenizer()
    ids = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.2, **dict.fromkeys(ids, tokenizer.pad_token_id),
    )  # fmt: skip
    return save_tiny(tmp_path_factory.mktemp("modernbert"), config, tokenizer)


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
