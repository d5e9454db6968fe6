"""What the entries of `train_dataset` may say, and what they take from the run."""

import pytest
import yaml
from pydantic import ValidationError

from rag_retrieval.core.config_file import ConfigError, load_config
from rag_retrieval.train.reranker.config import TRAINING, RerankerConfig

KEYS = {
    "model_name_or_path": "owner/model",
    "model_type": "bert_encoder",
    "train_dataset_type": "pointwise",
    "loss_type": "point_ce",
    "output_dir": "run",
}
GROUPED = {"train_dataset_type": "grouped", "loss_type": "listwise_ce"}


def files(entries: list, **changes) -> list[RerankerConfig]:
    return [alone for alone, _ in RerankerConfig(**(KEYS | changes), train_dataset=entries).files]


def problems(entries: list, **changes) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        RerankerConfig(**(KEYS | changes), train_dataset=entries)
    return [f"{entry['loc'][0]}: {entry['msg']}" for entry in caught.value.errors()]


def test_a_path_is_one_file_of_weight_one():
    config = RerankerConfig(**KEYS, train_dataset="a.jsonl")
    assert config.files == [(config, 1.0)] and config.train_dataset == "a.jsonl"


def test_each_file_has_the_configuration_of_a_run_on_it_alone():
    entries = ["a.jsonl", {"path": "b.jsonl", "type": "grouped", "loss_type": "listwise_ce", "weight": 2}]
    changes = {"max_label": 2, "train_label_key": "grade", "lr": 1e-4}
    config = RerankerConfig(**KEYS, **changes, train_dataset=entries)
    first, second = config.files
    assert first == (RerankerConfig(**KEYS, **changes, train_dataset="a.jsonl"), 1.0)
    alone = RerankerConfig(**(KEYS | GROUPED), train_label_key="grade", lr=1e-4, train_dataset="b.jsonl")
    assert second == (alone, 2.0), "with the label range of groups, which is none, and not that of pairs"


def test_an_entry_takes_the_keys_that_go_with_a_loss_only_with_that_loss():
    run = GROUPED | {"temperature": 0.5, "teacher_loss_type": "margin_mse", "teacher_weight": 0.7}
    same, other, own = files(
        ["a.jsonl", {"path": "b.jsonl", "loss_type": "listnet"}, {"path": "c.jsonl", "temperature": 2}], **run
    )
    assert (same.temperature, same.teacher_loss_type, same.teacher_weight) == (0.5, "margin_mse", 0.7)
    assert (other.temperature, other.teacher_loss_type, other.teacher_score_key) == (None, None, None)
    assert (own.temperature, own.teacher_loss_type) == (2.0, "margin_mse")


def test_none_in_an_entry_switches_off_what_the_run_has():
    run = GROUPED | {"teacher_loss_type": "margin_mse"}
    (alone,) = files([{"path": "a.jsonl", "teacher_loss_type": None, "teacher_score_key": "None"}], **run)
    assert (alone.teacher_loss_type, alone.teacher_weight, alone.teacher_score_key) == (None, None, None)


def test_the_other_names_of_a_loss_are_the_same_loss():
    (alone,) = files([{"path": "a.jsonl", "loss_type": "pointwise_bce"}], max_label=2)
    assert (alone.loss_type, alone.max_label) == ("point_ce", 2.0)


def test_a_split_is_for_the_entries_of_the_hub_alone():
    file, hub = files(["a.jsonl", "owner/set"], train_split="test")
    assert (file.train_split, hub.train_split) == (None, "test")
    assert files(["a.jsonl", "owner/set"])[1].train_split == "train"
    assert problems(["a.jsonl", "b.jsonl"], train_split="test") == [
        "train_split: is only for datasets of the hub, and train_dataset is a file; remove it"
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "b.jsonl", "wieght": 2}, "entry 2 (b.jsonl): unknown key wieght; an entry takes weight, path, type,"),
        ({"weight": 2}, "entry 2 (None): path: expected a file or a hub dataset, found null"),
        ("None", 'entry 2 (None): path: expected a file or a hub dataset, found "None"'),
        ({"path": 3}, "entry 2 (3): path: expected a file or a hub dataset, found 3"),
        ({"path": "b.jsonl", "weight": 0}, "entry 2 (b.jsonl): weight: expected a number above 0, the passes over"),
        ({"path": "b.jsonl", "weight": True}, "entry 2 (b.jsonl): weight: expected a number above 0"),
        ({"path": "b.jsonl", "weight": float("inf")}, "entry 2 (b.jsonl): weight: expected a number above 0"),
        ({"path": "b.jsonl", "type": "pairs"}, "entry 2 (b.jsonl): type: expected one of pointwise, grouped, found"),
        ({"path": "b.jsonl", "loss_type": "listnet"},
         "entry 2 (b.jsonl): loss_type: listnet is for grouped data, and type is pointwise; for pointwise data use"),
        ({"path": "b.jsonl", "type": "grouped"}, "entry 2 (b.jsonl): loss_type: point_ce is for pointwise data, and"),
        ({"path": "b.jsonl", "group_size": 4}, "entry 2 (b.jsonl): group_size: is only for type grouped"),
        ({"path": "b.jsonl", "split": "test"}, "entry 2 (b.jsonl): split: is only for datasets of the hub, and path"),
        ({"path": "b.jsonl", "batch_size": 0}, "entry 2 (b.jsonl): batch_size: expected a whole number of at least 1"),
        ({"path": "b.jsonl", "min_label": 5}, "entry 2 (b.jsonl): min_label: expected min_label below max_label"),
    ],
)  # fmt: skip
def test_what_an_entry_says_wrong_is_told_with_its_number_its_file_and_its_own_keys(entry, message):
    (found,) = problems(["a.jsonl", entry])
    assert found.startswith(f"train_dataset: {message}"), found


def test_what_is_wrong_with_the_run_is_not_told_again_of_each_entry():
    found = problems(["a.jsonl", "b.jsonl"], loss_type="listnet", warmup_proportion=2)
    assert [message.split(":")[0] for message in found] == ["warmup_proportion", "loss_type"]


def write(folder, **values) -> str:
    (folder / "train.yaml").write_text(yaml.safe_dump(KEYS | values))
    return str(folder / "train.yaml")


def test_paths_of_entries_are_looked_up_from_the_file_s_folder_too(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    config = load_config(TRAINING, write(tmp_path, train_dataset=["a.jsonl", {"path": "b.jsonl", "weight": 2}]))
    assert [alone.train_dataset for alone, _ in config.files] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    with pytest.raises(ConfigError, match=r"train_dataset: found no file c.jsonl; looked for "):
        load_config(TRAINING, write(tmp_path, train_dataset=["a.jsonl", {"path": "c.jsonl"}]))


def test_every_problem_of_every_entry_is_reported(tmp_path):
    entries = [{"path": "owner/a", "weight": -1, "loss": "listnet"}, {"path": "owner/b", "type": "grouped"}]
    with pytest.raises(ConfigError) as caught:
        load_config(TRAINING, write(tmp_path, train_dataset=entries))
    found = [line.partition("train_dataset: ")[2][:16] for line in str(caught.value).splitlines()]
    assert found == ["entry 1 (a): unk", "entry 1 (a): wei", "entry 2 (b): los"]


@pytest.mark.parametrize(
    ("text", "names", "weights"),
    [
        ("owner/a", ["owner/a"], [1.0]),
        ("owner/a,owner/b", ["owner/a", "owner/b"], [1.0, 1.0]),
        ("[owner/a, {path: owner/b, weight: 0.5}]", ["owner/a", "owner/b"], [1.0, 0.5]),
    ],
)
def test_the_command_line_takes_one_file_several_or_a_list_as_in_yaml(tmp_path, text, names, weights):
    config = load_config(TRAINING, write(tmp_path, train_dataset="owner/z"), ["--train_dataset", text])
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
    config = RerankerConfig(**(KEYS | GROUPED), teacher_loss_type="margin_mse", train_dataset=entries)
    config.save(tmp_path / "saved.yaml")
    assert load_config(TRAINING, str(tmp_path / "saved.yaml")) == config
