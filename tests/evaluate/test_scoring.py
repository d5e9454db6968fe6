"""The folder of an evaluation: locked while one runs, and kept for one model and one data set."""

import json

import pytest

from rag_retrieval.evaluate.scoring import locked_output_dir

CONFIG = {"model": "a", "data": "d", "split": "test", "depth": 100}


def test_the_folder_is_made_and_goes_again_when_nothing_came_into_it(tmp_path):
    folder = tmp_path / "new" / "out"
    with locked_output_dir(folder, CONFIG):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not folder.exists()


def test_a_second_evaluation_in_a_folder_waits_for_the_first(tmp_path):
    refused = pytest.raises(ValueError, match="another evaluation writes to .*; wait for it, or give another")
    with locked_output_dir(tmp_path, CONFIG), refused, locked_output_dir(tmp_path, CONFIG):
        pass
    with locked_output_dir(tmp_path, CONFIG):
        pass


def test_results_of_another_model_or_other_data_are_not_written_over(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"config": CONFIG}))
    with locked_output_dir(tmp_path, CONFIG | {"depth": 20}):
        pass
    refused = pytest.raises(ValueError, match="has the results of model a; give another output_dir, or remove it")
    with refused, locked_output_dir(tmp_path, CONFIG | {"model": "b"}):
        pass
    refused = pytest.raises(ValueError, match="has the results of data d, split test")
    with refused, locked_output_dir(tmp_path, CONFIG | {"data": "e", "split": "dev"}):
        pass


def test_relative_and_absolute_paths_name_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"config": CONFIG | {"model": str(tmp_path / "a")}}))
    with locked_output_dir(tmp_path, CONFIG):
        assert (tmp_path / ".lock").is_file()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        refused = pytest.raises(ValueError, match=f"output_dir: {tmp_path}/file is a file; give a folder")
        with refused, locked_output_dir(tmp_path / place, CONFIG):
            pass
