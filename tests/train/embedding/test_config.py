"""The keys of an embedder's configuration: what fits, what follows from what, what does not apply."""

import pytest
from pydantic import ValidationError

from rag_retrieval.train.embedding.config import EmbeddingConfig

REQUIRED = {"model_name_or_path": "owner/model", "train_dataset": "train.jsonl", "output_dir": "out"}


def problems(**changes) -> dict[str, str]:
    """Messages by key."""
    with pytest.raises(ValidationError) as caught:
        EmbeddingConfig(**REQUIRED | changes)
    return {entry["loc"][0]: entry["msg"] for entry in caught.value.errors()}


def test_a_model_data_and_a_folder_are_enough():
    config = EmbeddingConfig(**REQUIRED)
    assert (config.task, config.loss_type, config.temperature) == ("embedding", "info_nce", 0.02)
    assert (config.query_max_len, config.passage_max_len, config.train_group_size) == (128, 512, 8)
    assert (config.query_instruction, config.pooling, config.normalize) == (None, None, True)
    assert config.train_files == ["train.jsonl"]


def test_several_files_are_a_list_or_names_between_commas():
    for files in (["a.jsonl", "b.jsonl"], "a.jsonl, b.jsonl"):
        config = EmbeddingConfig(**REQUIRED | {"train_dataset": files})
        assert config.train_files == ["a.jsonl", "b.jsonl"]
        assert EmbeddingConfig.resolved_entries(config.model_dump()) == [{"path": "a.jsonl"}, {"path": "b.jsonl"}]


def test_wrong_values_are_refused_by_key():
    wrong = {
        "task": ["reranker"],
        "query_max_len": [3, "many"],
        "passage_max_len": [0],
        "pooling": ["max"],
        "train_group_size": [0],
        "temperature": [0, -1],
        "loss_type": ["listnet"],
        "max_len": [128],
        "max_tokens_with_graph": [-1],
    }
    for name, values in wrong.items():
        for value in values:
            assert problems(**{name: value}).keys() == {name}, (name, value)


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("directions", ["query_to_doc", "doc_to_query"], {"use_inbatch_neg": False}),
        ("hardness_mode", "all_negatives", {"hardness_strength": 0.0}),
        ("false_negative_margin_type", "relative", {}),
    ],
)
def test_an_option_without_what_it_needs_is_ignored(key, value, needed):
    ignored = EmbeddingConfig(**REQUIRED, **{key: value}, **needed)
    assert key in ignored.ignored and key not in ignored.loss_options
    applied = {"use_inbatch_neg": True, "hardness_strength": 5.0, "false_negative_margin": 0.1}
    config = EmbeddingConfig(**REQUIRED, **{key: value}, **applied)
    assert not config.ignored and list(config.loss_options[key]) == list(value)


def test_weights_of_in_batch_negatives_need_some():
    without = {"use_inbatch_neg": False, "hardness_strength": 5.0}
    assert "hard_negatives" in problems(**without)["hardness_mode"]
    EmbeddingConfig(**REQUIRED, **without, hardness_mode="hard_negatives")
    EmbeddingConfig(**REQUIRED, hardness_strength=5.0)


def test_the_judge_of_false_negatives_needs_a_margin():
    assert "teacher" in problems(false_negative_judge="teacher")["false_negative_margin"]


@pytest.mark.parametrize(
    ("applies", "changes"),
    [
        (True, {}),
        (True, {"loss_type": "cosent"}),
        (True, {"loss_type": "my_package.losses:mine"}),
        (True, {"use_inbatch_neg": False, "loss_type": "cosent"}),
        (True, {"teacher_loss_type": "margin_mse"}),
        (False, {"use_inbatch_neg": False}),
        (False, {"use_inbatch_neg": False, "teacher_loss_type": "m3_distillation"}),
        (False, {"loss_type": "cosine_regression"}),
        (False, {"loss_type": "kl_distillation"}),
    ],
)
def test_negatives_of_other_processes_are_for_losses_that_read_other_records(applies, changes):
    for value in (True, False):
        config = EmbeddingConfig(**REQUIRED, **changes, negatives_cross_device=value)
        assert ("negatives_cross_device" in (config.ignored or "")) != applies
        assert config.negatives_cross_device is (value if applies else None)
    assert EmbeddingConfig(**REQUIRED, **changes).negatives_cross_device is (True if applies else None)
