"""The keys of `rag-retrieval distill`: defaults by language, and mistakes reported with file, line and key."""

import pytest

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.models.prompts import PROMPTS

MINIMAL = {"dataset": "train.jsonl", "output": "out.jsonl", "teachers": "owner/model"}


@pytest.mark.parametrize("language", PROMPTS)
def test_the_question_follows_the_language_and_a_given_part_stays(language):
    config = DistillConfig(**MINIMAL, language=language, system="", max_len=None)
    prompt = PROMPTS[language]
    assert (config.system, config.prompt, config.instruction) == ("", prompt.user, prompt.instruction)
    assert (config.yes_token, config.no_token) == (prompt.yes_token, prompt.no_token)
    assert config.teachers == ["owner/model"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "one").mkdir()
    return tmp_path


def test_teachers_in_a_file_are_looked_up_beside_it(folder):
    text = "dataset: ../train.jsonl\noutput: out.jsonl\nteachers: [one, package:some-model]\n"
    (folder / "far" / "distill.yaml").write_text(text)
    config = load_config(DistillConfig, "far/distill.yaml", ["--prompt", "{query}\\n{document}"])
    assert config.teachers == [str(folder / "far" / "one"), "package:some-model"]
    assert config.dataset == str(folder / "train.jsonl") and config.output == "out.jsonl"
    assert config.prompt == "{query}\n{document}"
    both = load_config(DistillConfig, "far/distill.yaml", ["--teachers", "owner/a,far/one"])
    assert both.teachers == ["owner/a", str(folder / "far" / "one")]


def test_a_split_is_ignored_by_name_without_a_dataset_of_the_hub():
    assert "split (only for a dataset of the hub)" in DistillConfig(**MINIMAL, split="dev").ignored
    assert DistillConfig(**MINIMAL | {"dataset": "owner/data"}, split="dev").ignored is None


def test_all_mistakes_come_at_once_with_their_lines(folder):
    text = (
        "dataset: train.jsonl\noutput: out.csv\nteachers: [./none]\nprompt: '{document} {query}'\n"
        "language: fr\nbatchsize: 3\n"
    )
    (folder / "distill.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(DistillConfig, "distill.yaml")
    lines = str(caught.value).splitlines()
    for number, (line, named) in enumerate(zip(
        lines, ("out.csv", "./none", "{document} {query}", "fr", "did you mean batch_size?"), strict=True
    ), 2):  # fmt: skip
        assert line.startswith(f"distill.yaml:{number}: ") and named in line


def test_nothing_between_commas_is_no_teacher_and_not_the_current_folder(folder):
    with pytest.raises(ConfigError, match="--teachers: .* empty"):
        options = ["--dataset", "train.jsonl", "--output", "o.jsonl", "--teachers", "owner/a,,b/c"]
        load_config(DistillConfig, None, options)
