"""Keys of a pre-training: defaults that depend on the loss, what does not apply, and other programs' names."""

import pytest
from pydantic import ValidationError

from rag_retrieval.core.config_reader import load_config
from rag_retrieval.train.pretrain.config import PretrainConfig

KEYS = {"model_name_or_path": "m", "train_dataset": "t.jsonl", "output_dir": "o"}


def test_masks_default_to_those_of_the_method():
    retromae, spans = PretrainConfig(**KEYS), PretrainConfig(**KEYS, loss_type="span_pairs")
    assert retromae.loss_type == "retromae"
    assert (retromae.encoder_mlm_probability, retromae.decoder_mlm_probability) == (0.3, 0.5)
    assert (retromae.bag_of_words_weight, retromae.pooling, retromae.temperature) == (0, "cls", None)
    assert (spans.encoder_mlm_probability, spans.decoder_mlm_probability, spans.temperature) == (0.15, None, 0.05)


def test_keys_of_the_other_method_are_ignored_and_named():
    config = PretrainConfig(**KEYS, loss_type="span_pairs", decoder_mlm_probability=0.4, bag_of_words_weight=1)
    assert "decoder_mlm_probability, bag_of_words_weight (only for loss_type retromae)" in config.ignored
    config = PretrainConfig(**KEYS, pooling="mean", temperature=0.1, val_split="dev")
    assert "pooling, temperature (only for loss_type span_pairs)" in config.ignored and "val_split" in config.ignored
    assert (config.pooling, config.temperature) == ("cls", None)


def test_names_of_retromae_s_own_command_are_known():
    given = {"max_seq_length": 128, "mlm_probability": 0.2, "bow_loss_weight": 0.1}
    config = PretrainConfig(**KEYS, **given)
    assert (config.max_len, config.encoder_mlm_probability, config.bag_of_words_weight) == (128, 0.2, 0.1)


def test_several_sources_are_a_list_and_must_be_there(tmp_path):
    (tmp_path / "a.jsonl").touch(), (tmp_path / "texts").mkdir()
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\ntrain_dataset: a.jsonl,texts\noutput_dir: o\n")
    config = load_config(PretrainConfig, str(tmp_path / "run.yaml"))
    assert config.train_sources == [str(tmp_path / "a.jsonl"), str(tmp_path / "texts")]
    assert [entry["path"] for entry in PretrainConfig.resolved_entries(config.model_dump())] == config.train_sources
    with pytest.raises(ValueError, match="train_dataset.*found no file or folder b.jsonl"):
        load_config(PretrainConfig, str(tmp_path / "run.yaml"), ["--train_dataset", "b.jsonl"])


@pytest.mark.parametrize(
    "key, value",
    [("encoder_mlm_probability", 0), ("decoder_mlm_probability", 1.1), ("temperature", 0), ("loss_type", "mlm")],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        PretrainConfig(**KEYS, **{key: value})
