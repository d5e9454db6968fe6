"""Which trainer `rag-retrieval train` runs: the one that the file or the command line names."""

import pytest

from rag_retrieval.core.config_reader import asked_value
from rag_retrieval.train import script


@pytest.fixture
def chosen(monkeypatch):
    """The task for which `train_any` begins a run."""
    tasks = []
    monkeypatch.setattr(script, "main_of", lambda task, arguments: tasks.append(task) or 0)

    def choose(*arguments: str) -> str:
        assert script.train_any(list(arguments)) == 0
        return tasks.pop()

    return choose


def test_the_file_says_which_trainer_it_is_for(chosen, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-5\ntask: embedding\n")
    assert chosen("--config", str(file)) == "embedding"
    assert chosen(f"--config={file}", "--lr", "1e-3") == "embedding"
    file.write_text("lr: 1e-5\n")
    assert chosen("--config", str(file)) == "reranker"


def test_an_option_wins_over_the_file_and_the_last_over_others(chosen, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: embedding\n")
    assert chosen("--config", str(file), "--task", "reranker") == "reranker"
    assert chosen("--task=reranker", "--task", "embedding") == "embedding"
    assert chosen() == "reranker"


@pytest.mark.parametrize("text", ["task: [", "- a list", ""])
def test_a_file_that_cannot_be_read_is_left_to_the_reader_of_configurations(chosen, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    assert chosen("--config", str(tmp_path / "run.yaml")) == "reranker"
    assert chosen("--config", str(tmp_path / "missing.yaml")) == "reranker"


def test_an_unknown_trainer_is_a_mistake_that_names_those_there_are(capsys):
    assert script.train_any(["--task", "summarizer"]) == 2
    error = capsys.readouterr().err
    assert "summarizer" in error and all(task in error for task in script.TRAINERS)


def test_a_shipped_file_is_found_in_the_folder_of_its_trainer():
    folders = [trainer.config_folder for trainer in script.TRAINERS.values()]
    assert asked_value("loss_type", ["--config", "training_bert.yaml"], folders[::-1]) is not None


def test_a_file_for_another_trainer_is_refused_by_a_script(tmp_path, capsys):
    from rag_retrieval.train.reranker.train_reranker import main

    (tmp_path / "run.yaml").write_text("task: embedding\n")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "task: expected one of reranker, found embedding" in capsys.readouterr().err
