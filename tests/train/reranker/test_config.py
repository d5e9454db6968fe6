"""The keys of a reranker's configuration: what fits, what follows from what, what does not apply; several files."""

import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError
from training_runs import ROOT

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.losses import LOSSES
from rag_retrieval.metrics import METRICS
from rag_retrieval.train.reranker.config import OPTION_KEYS, TEACHER_LOSSES, RerankerConfig

POINTWISE = {
    "model_name_or_path": "owner/model",
    "model_type": "bert_encoder",
    "train_dataset": "train.jsonl",
    "train_dataset_type": "pointwise",
    "loss_type": "point_ce",
    "output_dir": "out",
}
GROUPED = POINTWISE | {"train_dataset_type": "grouped", "loss_type": "listwise_ce"}
DECODER = POINTWISE | {"model_type": "llm_decoder"}


def problems(base: dict, **changes) -> dict[str, str]:
    """Messages by key."""
    with pytest.raises(ValidationError) as caught:
        RerankerConfig(**base | changes)
    return {entry["loc"][0]: entry["msg"] for entry in caught.value.errors()}


def ignored(base: dict, **changes) -> str:
    """The line that names what does not apply; the configuration is as without it."""
    config = RerankerConfig(**base | changes)
    assert config.model_dump() == RerankerConfig(**base).model_dump()
    assert all(name in config.ignored for name in changes)
    return config.ignored


# Model


def test_a_decoder_gets_its_four_texts_and_a_given_one_stays():
    config = RerankerConfig(**DECODER, seq="")
    assert (config.query_format, config.document_format) == ("query: {}", "document: {}")
    assert (config.seq, config.special_token, config.head) == ("", "\nrelevance", "scalar")
    assert problems(DECODER, special_token="").keys() == {"special_token"}


def test_a_yes_no_head_takes_its_texts_from_the_model_by_default():
    config = RerankerConfig(**DECODER, head="yes_no", seq="\n", instruction="i")
    assert (config.head, config.query_format, config.seq, config.yes_token) == ("yes_no", None, "\n", None)
    assert config.instruction == "i" and config.ignored is None


def test_formats_are_for_encoders_too_and_come_with_the_model_unless_given():
    config = RerankerConfig(**POINTWISE, query_format="q: {}", document_format="{}")
    assert (config.query_format, config.document_format, config.ignored) == ("q: {}", "{}", None)
    assert RerankerConfig(**POINTWISE).query_format is None


def test_keys_of_another_model_type_or_head_are_ignored_by_name():
    line = ignored(POINTWISE, seq=" ", special_token="x", head="yes_no", instruction="i", yes_token="y")
    assert "llm_decoder" in line and "yes_no" in line
    assert "yes_no" in ignored(DECODER, instruction="i", yes_token="y", no_token="n")


def test_a_format_needs_its_place_exactly_once():
    for base in (POINTWISE, DECODER):
        for text in ("", "query:", "{} {}", "{ }"):
            assert problems(base, query_format=text, document_format=text).keys() == {"query_format", "document_format"}


def test_one_label_is_accepted_and_more_are_refused_with_the_reason():
    for value in (1, "1", None):
        assert RerankerConfig(**POINTWISE, num_labels=value) == RerankerConfig(**POINTWISE)
    for value in (2, True, "two"):
        (message,) = problems(POINTWISE, num_labels=value).values()
        assert "expected 1" in message and "one score" in message


# Data


def test_the_loss_decides_the_data_type_where_none_is_given():
    for name, loss in LOSSES.items():
        config = RerankerConfig(**POINTWISE | {"train_dataset_type": None, "loss_type": name})
        assert config.train_dataset_type == loss.dataset_type


def test_a_loss_for_other_data_is_refused_with_those_that_fit():
    found = problems(GROUPED, loss_type="point_mse", teacher_loss_type="point_ce")
    assert found.keys() == {"loss_type", "teacher_loss_type"}
    for name, loss in LOSSES.items():
        assert (name in found["loss_type"]) == (loss.dataset_type == "grouped" or name == "point_mse")
    assert "kl_distillation" in found["teacher_loss_type"] and "listnet" not in found["teacher_loss_type"]


def test_grouped_data_get_a_group_size_and_pairs_a_label_range():
    config = RerankerConfig(**GROUPED)
    assert (config.train_group_size, config.max_label, config.min_label) == (8, None, None)
    config = RerankerConfig(**POINTWISE, max_label=3)
    assert (config.train_group_size, config.min_label, config.max_label) == (None, 0.0, 3.0)
    assert RerankerConfig(**GROUPED, max_label=3).max_label == 3.0, "one end alone is checked alone"
    assert "grouped" in ignored(POINTWISE, train_group_size=4)


def test_label_ranges_upside_down_or_beyond_a_loss_are_refused():
    assert problems(GROUPED, max_label=1, min_label=1).keys() == {"max_label"}
    assert problems(POINTWISE, min_label=1.5).keys() == {"min_label"}
    assert problems(POINTWISE, max_label=-1).keys() == {"max_label"}
    found = problems(GROUPED, loss_type="lambda_loss", min_label=-1, max_label=40)
    assert found.keys() == {"min_label", "max_label"} and "31" in found["max_label"]


def test_validation_follows_the_training_data_by_default():
    config = RerankerConfig(**GROUPED, val_dataset="owner/data", train_label_key="grade")
    assert (config.val_label_key, config.val_split, config.metric_for_best_model) == ("grade", "validation", "ndcg@10")
    assert "val_dataset" in ignored(POINTWISE, val_label_key="grade", metric_for_best_model="map")


def test_any_metric_of_the_table_may_decide_which_checkpoint_is_best():
    for name in ("loss", "pair_accuracy", *(metric.pattern.replace("@k", "@5") for metric in METRICS.values())):
        config = RerankerConfig(**POINTWISE, val_dataset="val.jsonl", metric_for_best_model=name)
        assert config.metric_for_best_model == name
    found = problems(POINTWISE, val_dataset="val.jsonl", metric_for_best_model="ndcg")
    assert "ndcg@k" in found["metric_for_best_model"]


def test_only_datasets_of_the_hub_have_a_split():
    assert RerankerConfig(**POINTWISE | {"train_dataset": "owner/data"}).train_split == "train"
    assert RerankerConfig(**POINTWISE | {"train_dataset": "data"}, train_split="dev").train_split == "dev"
    assert "hub" in ignored(POINTWISE, train_split="train")


# Losses


def test_other_names_of_losses_become_the_one_name():
    assert RerankerConfig(**POINTWISE | {"loss_type": "pointwise_mse"}).loss_type == "point_mse"
    config = RerankerConfig(**POINTWISE, teacher_loss_type="pointwise_bce")
    assert config.teacher_loss_type == "point_ce"


def test_unknown_losses_are_refused_with_those_that_there_are():
    message = problems(POINTWISE, loss_type="bce")["loss_type"]
    assert all(name in message for name in LOSSES) and "module:function" in message
    for wrong in (["point_ce"], "my_losses:", ":mine", "a b:c"):
        assert problems(POINTWISE, loss_type=wrong).keys() == {"loss_type"}
    assert all(name in problems(GROUPED, teacher_loss_type="listnet")["teacher_loss_type"] for name in TEACHER_LOSSES)


def test_a_user_loss_is_named_and_needs_a_data_type():
    config = RerankerConfig(**GROUPED | {"loss_type": "my_package.losses:mine"})
    assert (config.loss_type, config.train_dataset_type) == ("my_package.losses:mine", "grouped")
    assert (config.temperature, config.teacher_score_key) == (None, "teacher_score")
    found = problems(GROUPED, loss_type="my_package.losses:mine", train_dataset_type=None)
    assert found.keys() == {"train_dataset_type"}


def test_a_loss_gets_the_defaults_of_its_options_and_no_others():
    for name, loss in LOSSES.items():
        base = GROUPED if loss.dataset_type == "grouped" else POINTWISE
        config = RerankerConfig(**base | {"loss_type": name})
        expected = dict.fromkeys(OPTION_KEYS) | {option.name: option.default for option in loss.options}
        assert {key: getattr(config, key) for key in OPTION_KEYS} == expected
        assert config.teacher_score_key == ("teacher_score" if loss.reads == "teacher_score" else None)
    assert RerankerConfig(**GROUPED).temperature == 1.0
    assert RerankerConfig(**GROUPED, teacher_loss_type="kl_distillation").teacher_temperature == 1.0


def test_loss_options_have_the_tables_ranges_and_apply_to_their_loss():
    assert problems(GROUPED, temperature=0).keys() == {"temperature"}
    assert problems(GROUPED, loss_type="lambda_loss", lambda_weights="x", lambda_top_k=0).keys() == {
        "lambda_weights", "lambda_top_k"
    }  # fmt: skip
    line = ignored(GROUPED | {"loss_type": "listmle"}, temperature=0.5, lambda_top_k=10, lambda_weights="lambdarank")
    assert "listwise_ce, info_nce or kl_distillation" in line and "lambda_loss" in line


def test_a_teacher_loss_gets_half_of_the_weight_unless_given_another():
    config = RerankerConfig(**GROUPED, teacher_loss_type="kl_distillation")
    assert (config.teacher_weight, config.teacher_score_key) == (0.5, "teacher_score")
    config = RerankerConfig(**POINTWISE, teacher_loss_type="point_ce", teacher_score_key="p", teacher_weight=1)
    assert (config.teacher_weight, config.teacher_temperature, config.teacher_score_key) == (1.0, None, "p")
    ignored(GROUPED, teacher_weight=0.5, teacher_temperature=2.0, teacher_score_key="logit")
    ignored(GROUPED | {"teacher_loss_type": "margin_mse"}, teacher_temperature=2.0)


def test_every_key_says_what_it_means():
    assert all(len(field.description) > 15 for field in RerankerConfig.model_fields.values())


def test_the_page_of_losses_has_a_row_for_each():
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}`" in page for name in LOSSES)


# Several training files

RUN = {key: value for key, value in POINTWISE.items() if key != "train_dataset"}
GROUPED_RUN = {"train_dataset_type": "grouped", "loss_type": "listwise_ce"}


def files(entries: list, **changes) -> list[RerankerConfig]:
    return [alone for alone, _ in RerankerConfig(**(RUN | changes), train_dataset=entries).files]


def test_a_path_is_one_file_of_weight_one():
    config = RerankerConfig(**RUN, train_dataset="a.jsonl")
    assert config.files == [(config, 1.0)] and config.train_dataset == "a.jsonl"


def test_each_file_has_the_configuration_of_a_run_on_it_alone():
    entries = ["a.jsonl", {"path": "b.jsonl", "loss_type": "listwise_ce", "weight": 2}]  # the loss decides the type
    changes = {"max_label": 2, "train_label_key": "grade", "lr": 1e-4}
    config = RerankerConfig(**RUN, **changes, train_dataset=entries)
    (first, one), (second, two) = config.files
    assert first.model_dump() == RerankerConfig(**RUN, **changes, train_dataset="a.jsonl").model_dump()
    alone = RerankerConfig(**(RUN | GROUPED_RUN), train_label_key="grade", lr=1e-4, train_dataset="b.jsonl")
    assert second.model_dump() == alone.model_dump(), "with the label range of groups, which is none"
    assert (one, two) == (1.0, 2.0)


def test_an_entry_inherits_the_options_of_a_loss_only_with_it():
    run = GROUPED_RUN | {"temperature": 0.5, "teacher_loss_type": "margin_mse", "teacher_weight": 0.7}
    same, other, own = files(
        ["a.jsonl", {"path": "b.jsonl", "loss_type": "info_nce"}, {"path": "c.jsonl", "temperature": 2}], **run
    )
    assert (same.temperature, same.teacher_loss_type, same.teacher_weight) == (0.5, "margin_mse", 0.7)
    assert (other.temperature, other.teacher_loss_type, other.teacher_score_key) == (1.0, None, None)
    assert (own.temperature, own.teacher_loss_type) == (2.0, "margin_mse")


def test_none_in_an_entry_switches_off_what_the_run_has():
    run = GROUPED_RUN | {"teacher_loss_type": "margin_mse"}
    (alone,) = files([{"path": "a.jsonl", "teacher_loss_type": None, "teacher_score_key": "None"}], **run)
    assert (alone.teacher_loss_type, alone.teacher_weight, alone.teacher_score_key) == (None, None, None)


def test_numbers_that_no_library_takes_are_refused():
    for key, value in (("seed", 2**32), ("lora_r", 10**26), ("lora_r", 10**14), ("epochs", "9" * 5000)):
        with pytest.raises(ValidationError, match=key):
            RerankerConfig(**RUN, train_dataset="a.jsonl", **{key: value})


def test_a_split_is_for_the_entries_of_the_hub_alone():
    file, hub = files(["a.jsonl", "owner/set"], train_split="test")
    assert (file.train_split, hub.train_split) == (None, "test")
    assert files(["a.jsonl", "owner/set"])[1].train_split == "train"


def test_a_mistake_in_an_entry_names_its_number_file_and_key():
    wrong = [
        ({"path": "b.jsonl", "wieght": 2}, "wieght"),
        ({"weight": 2}, "path"),
        ("None", "path"),
        ({"path": 3}, "path"),
        ({"path": "b.jsonl", "weight": 0}, "weight"),
        ({"path": "b.jsonl", "weight": float("inf")}, "weight"),
        ({"path": "b.jsonl", "weight": 1e308}, "weight"),
        ({"path": "b.jsonl", "type": "pairs"}, "type"),
        ({"path": "b.jsonl", "type": "pointwise", "loss_type": "listnet"}, "loss_type"),
        ({"path": "b.jsonl", "type": "grouped"}, "loss_type"),
        ({"path": "b.jsonl", "batch_size": 0}, "batch_size"),
        ({"path": "b.jsonl", "min_label": 5}, "min_label"),
    ]
    for entry, name in wrong:
        (message,) = problems({**RUN, "train_dataset": ["a.jsonl", entry]}).values()
        assert message.startswith("entry 2 (") and f"{name}" in message, entry


def test_an_entrys_key_that_does_not_apply_is_ignored_by_name():
    config = RerankerConfig(**RUN, train_dataset=["a.jsonl", {"path": "b.jsonl", "group_size": 4, "split": "test"}])
    assert config.ignored.count("entry 2 (b.jsonl)") == 2 and "group_size" in config.ignored
    assert config.train_dataset[1]["group_size"] is None


def test_every_problem_of_every_entry_is_reported():
    entries = [{"path": "owner/a", "weight": -1, "loss": "listnet"}, {"path": "owner/b", "type": "grouped"}]
    with pytest.raises(ValidationError) as caught:
        RerankerConfig(**RUN, train_dataset=entries)
    assert [entry["msg"][:12] for entry in caught.value.errors()] == ["entry 1 (a):", "entry 1 (a):", "entry 2 (b):"]


def write(folder, **values) -> str:
    (folder / "train.yaml").write_text(yaml.safe_dump(RUN | values))
    return str(folder / "train.yaml")


def test_paths_of_entries_are_looked_up_from_the_file_s_folder_too(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    config = load_config(RerankerConfig, write(tmp_path, train_dataset=["a.jsonl", {"path": "b.jsonl", "weight": 2}]))
    assert [alone.train_dataset for alone, _ in config.files] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    with pytest.raises(ConfigError, match=r"train_dataset.*found no file c.jsonl; looked for "):
        load_config(RerankerConfig, write(tmp_path, train_dataset=["a.jsonl", {"path": "c.jsonl"}]))


def test_the_command_line_takes_one_file_several_or_a_yaml_list(tmp_path):
    for text, names, weights in (
        ("owner/a", ["owner/a"], [1.0]),
        ("owner/a,owner/b", ["owner/a", "owner/b"], [1.0, 1.0]),
        ("[owner/a, {path: owner/b, weight: 0.5}]", ["owner/a", "owner/b"], [1.0, 0.5]),
    ):
        config = load_config(RerankerConfig, write(tmp_path, train_dataset="owner/z"), ["--train_dataset", text])
        assert [alone.train_dataset for alone, _ in config.files] == names
        assert [weight for _, weight in config.files] == weights
        assert isinstance(config.train_dataset, str) == (text == "owner/a")


def test_the_written_yaml_reads_back_as_an_equal_configuration(tmp_path):
    entries = [
        "owner/a",
        {"path": "owner/b", "loss_type": "lambda_loss", "weight": 0.25},
        {"path": "owner/c", "type": "pointwise", "loss_type": "point_mse", "max_label": 3},
        {"path": "owner/d", "teacher_loss_type": None},
    ]
    config = RerankerConfig(**(RUN | GROUPED_RUN), teacher_loss_type="margin_mse", train_dataset=entries)
    config.save(tmp_path / "saved.yaml")
    assert load_config(RerankerConfig, str(tmp_path / "saved.yaml")) == config


def test_reading_a_configuration_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'accelerate', 'datasets', 'pyarrow'}"
    code = f"import sys, rag_retrieval.train.reranker.config; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr
