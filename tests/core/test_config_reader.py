"""Reading a YAML file and options: what is accepted, who wins, and where a mistake is reported."""

import os

import pytest
from core.config_samples import Sample

from rag_retrieval.core.config_reader import ConfigError, find_config, load_config, split_arguments


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder of every test is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, path: str = "train.yaml") -> str:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def load(text: str = "", *options: str) -> Sample:
    return load_config(Sample, write(f"{text}\nmodel: m\n" if "model:" not in text else text), options)


def errors(text: str = "", *options: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *options)
    return str(caught.value).split("\n")


def places(lines: list[str]) -> list[str]:
    """`train.yaml:3: lr` of each line."""
    return [": ".join(line.split(": ")[:2]) for line in lines]


# Values


def test_every_way_to_write_a_number_is_a_number_in_file_and_option():
    for number in ("5e-5", "5E-5", "5.0e-5", ".5e-4", "0.00005", "+5e-5", "5e-05", "500e-7", '"5e-5"'):
        assert load(f"lr: {number}").lr == pytest.approx(5e-5)
    for number in ("5e-5", ".5e-4", "+5e-5"):
        assert load("", f"--lr={number}").lr == load("", "--lr", number).lr == pytest.approx(5e-5)
    assert load("lr: 1e0").lr == load("lr: 1").lr == load("lr: 1.").lr == 1.0


def test_text_stays_text():
    assert load("output_dir: 2024").output_dir == "2024"
    assert load("output_dir: 1e5", "--val", "no").output_dir == "1e5"
    assert load("", "--output_dir=a=b").output_dir == "a=b"
    assert load("kind: no").kind == load("", "--kind", "no").kind == "no"
    assert load("resume: auto\nsplit: 2024-01-01").split == "2024-01-01"


def test_none_null_tilde_and_nothing_mean_absent():
    for absent in ("None", "null", "~", "", '"None"', "none", "NULL", "'None'"):
        assert load(f"val: {absent}\nlr: {absent}\nkind: {absent}\nsave: {absent}") == load()
    for absent in ("None", "null", "~", ""):
        assert load("val: owner/data\nkind: decoder", f"--val={absent}", "--kind", absent) == load()
    assert load("max_norm: None").max_norm is None


def test_switches_are_spelt_as_in_yaml_and_an_option_alone_is_on():
    for word, value in (("true", True), ("False", False), ("yes", True), ("off", False), ("1", True), ("0", False)):
        assert load(f"save: {word}").save is load("", "--save", word).save is load("", f"--save={word}").save is value
    assert load("save: false", "--save").save and load("save: false", "--save", "--lr", "1").save


def test_dashes_and_underscores_are_the_same_in_options():
    assert load("", "--output-dir", "a").output_dir == load("", "--output_dir", "a").output_dir == "a"


def test_backslashes_are_read_in_escaped_texts_of_options_alone():
    decoder = "kind: decoder"
    assert load(decoder, "--seq", "\\n").seq == "\n"
    assert load(decoder, "--seq", "a\\tb\\\\n").seq == "a\tb\\n"
    assert load(decoder, "--seq=").seq == "" and load(decoder, "--seq=--").seq == "--"
    assert load("", "--output_dir", "a\\nb").output_dir == "a\\nb"
    assert load('kind: decoder\nseq: "\\n\\n"').seq == "\n\n" and load("kind: decoder\nseq: '\\n'").seq == "\\n"
    assert load('kind: decoder\nseq: ""').seq == ""


def test_lists_in_file_and_option():
    for text in ("[a, b]", "a,b", "a, b", "\n  - a\n  - b"):
        assert load(f"teachers: {text}").teachers == ["a", "b"]
    assert load("", "--teachers", "a,b").teachers == load("", "--teachers", "[a, b]").teachers == ["a", "b"]
    assert load("", "--teachers", "a").teachers == load("", "--teachers=[a]").teachers == ["a"]
    assert load("train: a").train == "a"
    assert load("", "--train", "[{path: a, weight: 2}, b]").train == [{"path": "a", "weight": "2"}, "b"]


def test_an_existing_file_with_a_comma_is_one_file(folder):
    (folder / "a,b.jsonl").touch()
    (folder / "x,y").mkdir()
    assert load("", "--train", "a,b.jsonl").train == "a,b.jsonl"
    assert load("train: a,c.jsonl").train == ["a", "c.jsonl"]
    assert load("", "--teachers", "x,y").teachers == [f"{folder}/x,y"]


def test_a_byte_order_mark_is_no_part_of_the_first_key(folder):
    (folder / "bom.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert load_config(Sample, "bom.yaml").model == "m"


# Who wins


def test_options_win_over_the_file_and_the_last_of_equal_ones_over_the_others():
    config = load("lr: 1e-3\nepoch: 2\nsave: true", "--lr", "3e-5", "--epochs=5", "--save", "false")
    assert (config.lr, config.epochs, config.save) == (3e-5, 5, False)
    assert load("", "--lr", "1e-3", "--lr", "1e-4").lr == 1e-4
    assert load("lr: many", "--lr", "1e-4").lr == 1e-4
    assert load("train: [{path: a}, 3]", "--train", "b").train == "b"


def test_options_alone_are_enough():
    assert load_config(Sample, None, ["--model", "m"]) == load()


def test_the_file_s_name_is_split_from_the_other_options():
    assert split_arguments(["--lr", "1", "--config", "a.yaml", "--seed=2"]) == ("a.yaml", ["--lr", "1", "--seed=2"])
    assert split_arguments(["--config=a.yaml", "--lr", "1"]) == ("a.yaml", ["--lr", "1"])
    assert split_arguments(["--lr", "1"]) == (None, ["--lr", "1"])
    with pytest.raises(ConfigError, match="--config: needs a value"):
        split_arguments(["--lr", "1", "--config"])


# Mistakes


@pytest.mark.parametrize(
    "line, named",
    [
        ("epochs: many", ["whole number of at least 1", "many"]),
        ("epochs: 0", ["at least 1", "0"]),
        ("epochs: true", ["whole number", "true"]),
        ("epochs: [1, 2]", ["whole number", '["1", "2"]']),
        ("epochs: 1.5", ["whole number", "1.5"]),
        ("epochs: " + "9" * 5000, ["whole number", "9 ..."]),
        ("lr: .nan", ["above 0", ".nan"]),
        ("lr: inf", ["above 0", "inf"]),
        ("save: often", ["true or false", "often"]),
        ('output_dir: ""', ["non-empty text", '""']),
        ("kind: bert", ["encoder, decoder, no", "bert"]),
        ("kindd: decoder", ["unknown key", "did you mean kind?"]),
        ("zzz:", ["unknown key", "--help_all"]),
        ("<<: {a: b}", ["unknown key"]),
        ("lr: 2", ["at most 1 over all {epochs}", "2"]),
        ("teachers: ./none", ["no folder ./none", "/none"]),
        ('model: "package:a/b"', ["package:", "package:a/b"]),
    ],
)
def test_a_mistake_is_one_line_with_file_line_key_and_value(line, named):
    (message,) = errors(line)
    assert message.startswith(f"train.yaml:1: {line.partition(':')[0]}: ") and len(message) < 200
    assert all(part in message for part in named)


def test_mistakes_of_options_name_the_option_as_typed():
    for options, start, named in (
        (["--out-dir", "x"], "--out-dir: ", "did you mean output_dir?"),
        (["--lr", "-1"], "--lr: ", "-1"),
        (["--lr"], "--lr: ", "needs a value"),
        (["--lr", "--save"], "--lr: ", "needs a value"),
        (["stray"], "stray: ", "--key value"),
        (["--teachers", "[a"], "--teachers:1", "broken YAML"),
        (["--save", "maybe"], "--save: ", "true or false"),
    ):
        (message,) = errors("", *options)
        assert message.startswith(start) and named in message


def test_missing_keys_are_named_with_what_they_take():
    for path, start in ((write("lr: 1"), "train.yaml: model: is missing"), (None, "--model: is missing")):
        with pytest.raises(ConfigError) as caught:
            load_config(Sample, path)
        assert str(caught.value).startswith(start) and "non-empty text" in str(caught.value)


def test_a_key_given_twice_is_an_error_at_every_depth_and_under_its_other_name():
    assert places(errors("lr: 1e-3\nsave: 1\nlr: 1e-3")) == ["train.yaml:3: lr"]
    assert places(errors("epoch: 1\nepochs: 1")) == ["train.yaml:2: epochs"]
    (line,) = errors("train:\n  - path: a\n    weight: 1\n    path: b\n")
    assert line.startswith("train.yaml:4: train[0].path: ") and "train.yaml:2" in line


def test_a_mistake_inside_a_list_has_its_own_line():
    assert places(errors("train:\n  - a\n  -\n    - b")) == ["train.yaml:4: train[1]"]
    assert places(errors("teachers:\n  - a\n  - ./gone")) == ["train.yaml:3: teachers[1]"]


def test_all_mistakes_come_at_once_in_the_order_of_the_file_then_of_the_options():
    text = "kind: bert\nepoch: 0\nval: data/gone.jsonl\nlr: many\nsavee: 3\nsave: 1\nsave: 2"
    found = places(errors(text, "--folder=gone", "--nope", "1", "stray"))
    assert found[:6] == [f"train.yaml:{line}" for line in
        ("1: kind", "2: epoch", "3: val", "4: lr", "5: savee", "7: save")]  # fmt: skip
    assert [line.partition(":")[0] for line in found[6:]] == ["--folder", "--nope", "stray"]


@pytest.mark.parametrize(
    "content, place, named",
    [
        (b"", "train.yaml: ", "empty"),
        (b"# only a comment\n", "train.yaml: ", "empty"),
        (b"- a\n", "train.yaml: ", "list"),
        (b"hello\n", "train.yaml: ", "text"),
        (b"lr: 1\n[a, b]: 2\n", "train.yaml:2: ", "name of a key"),
        (b"lr: 1\nname: caf\xe9\n", "train.yaml:2: ", "0xe9"),
        (b"lr: 1\nab: \x07\n", "train.yaml:2:5: ", "U+0007"),
        (b"lr: 1\nseed: 'a\n", "train.yaml:3:1: ", "end of stream"),
        (b"lr: 1\n\tseed: 1\n", "train.yaml:2:1: ", "'\\t'"),
        (b"lr: *x\n", "train.yaml:1:5: ", "alias 'x'"),
        (b"lr: !!python/name:os.system\n", "train.yaml:1: ", "!!python/name:os.system"),
        (b"a: 1\nb: !!bool maybe\n", "train.yaml:2: ", "!!bool"),
        (b'lr: !!int ""\n', "train.yaml:1: ", "!!int"),
        (b"lr: !!timestamp x\n", "train.yaml:1: ", "!!timestamp"),
        (b'lr: "\\U00110000"\n', "train.yaml: ", "Unicode"),
        (b'a: 1\nlr: "\\ud83d"\n', "train.yaml:2: ", "surrogate"),
        (b"lr: &a [*a]\n", "train.yaml:1: ", "nested"),
        (b"foo: " + b"[" * 5000 + b"]" * 5000, "train.yaml: ", "nested"),
        (b"--- a: b\n", "train.yaml:1:6: ", "broken YAML"),
        (b"a: b\n---\na: c\n", "train.yaml:2:1: ", "another document"),
        (b"x: " + b"y" * (1 << 20), "train.yaml: ", "1,048,576 bytes"),
    ],
)
def test_a_broken_file_is_one_clear_line(folder, content, place, named):
    (folder / "train.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Sample, "train.yaml")
    message = str(caught.value)
    assert message.startswith(place) and named in message and "\n" not in message


def test_an_alias_bomb_ends_at_once():
    bomb = "a: &a [" + "x," * 90 + "]\n" + "".join(
        f"{name}: &{name} [{f'*{before},' * 90}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
    )  # fmt: skip
    (line,) = errors(bomb)
    assert "too large" in line and "10,000" in line


def test_a_file_that_cannot_be_read_says_why(folder, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    write("model: m")
    monkeypatch.setattr(type(folder), "open", refuse)
    with pytest.raises(ConfigError, match="^train.yaml: .*Permission denied$"):
        load_config(Sample, "train.yaml")


def test_a_deleted_current_folder_is_one_clear_line(folder, monkeypatch):
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    os.rmdir(folder / "gone")
    with pytest.raises(ConfigError, match="current folder"):
        load_config(Sample, None, ["--model", "m"])


# Finding files


def test_the_file_is_found_here_first_and_then_in_the_shipped_folder(folder):
    shipped = folder / "config"
    shipped.mkdir()
    write("model: m\nepochs: 1", "config/train.yaml")
    assert load_config(Sample, "train.yaml", [], shipped).epochs == 1
    assert load_config(Sample, "config/train.yaml", [], shipped).epochs == 1
    write("model: m\nepochs: 2")
    assert load_config(Sample, "train.yaml", [], shipped).epochs == 2
    assert find_config(str(folder / "train.yaml"), shipped) == folder / "train.yaml"
    with pytest.raises(ConfigError) as caught:
        find_config("x.yaml", shipped)
    assert f"{folder}/x.yaml and {shipped}/x.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="config: is a folder"):
        find_config("config")


def test_mistakes_of_a_file_elsewhere_show_its_whole_path(folder, monkeypatch):
    write("model: m\nepochs: x")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    with pytest.raises(ConfigError, match=f"^{folder}/train.yaml:2: epochs: "):
        load_config(Sample, "../train.yaml")


@pytest.fixture
def elsewhere(folder, monkeypatch):
    """YAML in one folder, the run in another: (folder of the YAML file, current folder)."""
    (folder / "yaml").mkdir()
    (folder / "run").mkdir()
    monkeypatch.chdir(folder / "run")
    return folder / "yaml", folder / "run"


def test_paths_are_looked_up_here_first_and_then_beside_the_file(elsewhere):
    beside, here = elsewhere
    write("model: model\nval: ./v.parquet\nfolder: runs/a\nbeside: a.txt\nresume: runs/a\nsplit: s.jsonl",
          str(beside / "train.yaml"))  # fmt: skip
    for place in (beside, here):  # the second round adds the same names to the current folder: it wins
        (place / "model").mkdir()
        (place / "runs/a").mkdir(parents=True)
        for name in ("v.parquet", "a.txt", "s.jsonl"):
            (place / name).touch()
        config = load_config(Sample, "../yaml/train.yaml")
        assert (config.model, config.val, config.folder) == (f"{place}/model", f"{place}/v.parquet", f"{place}/runs/a")
        assert (config.beside, config.split) == (f"{place}/a.txt", f"{place}/s.jsonl")
        assert config.resume == f"{place}/runs/a" and config.output_dir == "out"
        assert load_config(Sample, "../yaml/train.yaml", ["--beside", "model"]).beside == f"{place}/model"


def test_a_missing_path_names_every_place_where_it_was_looked_for(elsewhere):
    beside, here = elsewhere
    write("model: ./m\nval: d/t.jsonl.gz\nfolder: ../f\nbeside: b\nsplit: s.jsonl", str(beside / "train.yaml"))
    with pytest.raises(ConfigError) as caught:
        load_config(Sample, "../yaml/train.yaml")
    lines = str(caught.value).split("\n")
    wanted = [("no folder", "m"), ("no file", "d/t.jsonl.gz"), ("no folder", "../f"), ("file or folder", "b"),
              ("no file", "s.jsonl")]  # fmt: skip
    assert len(lines) == len(wanted)
    for line, (kind, name) in zip(lines, wanted, strict=True):
        assert kind in line and all(os.path.normpath(place / name) in line for place in elsewhere)


def test_what_is_no_file_stays_a_name(folder):
    config = load("model: BAAI/bge-reranker-v2.5\nval: o/d_2\nsplit: dev\nresume: auto\nteachers: package:some-model")
    assert (config.model, config.val, config.split, config.resume, config.teachers) == (
        "BAAI/bge-reranker-v2.5", "o/d_2", "dev", "auto", ["package:some-model"]
    )  # fmt: skip
    for name in ("auto", "dev"):
        (folder / name).mkdir()
    assert (load("resume: auto").resume, load("split: dev").split) == ("auto", "dev")
    assert load("resume: ./auto").resume == str(folder / "auto")
    (folder / "m.d").touch()
    assert "no folder ./m.d" in errors("model: ./m.d")[0]
    for name in ("./m", "/nowhere/m", "~/nowhere-m", "a/b/c", "my model"):
        assert f"no folder {name}; looked for /" in errors(f"model: {name}")[0]


def test_the_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a.jsonl").touch()
    assert load("val: ~/a.jsonl").val == str(folder / "a.jsonl")
    assert load("output_dir: ~/runs/a").output_dir == load("", "--output_dir=~/runs/a").output_dir == f"{folder}/runs/a"
