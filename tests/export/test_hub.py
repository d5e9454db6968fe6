"""Uploading a model: what is sent to a hub, whose card goes along, and what is refused before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_hub import fake_hub
from tiny_models import tiny_bert

from rag_retrieval.cli import main
from rag_retrieval.core.files import lock_file_of, locked
from rag_retrieval.export.hub import push_to_hub, stage
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.train.card import MARK, About, write_card
from rag_retrieval.train.reranker.card import RERANKER

TOKEN = "hf_thisIsASecret"
RESULT = dict(
    data="test.jsonl", candidates="BM25", queries=2, pairs=4, comparison=[],
    config={"split": "test", "model": "gone/model"},
    model={"name": "m", "ndcg@10": 0.75}, baseline={"name": "BM25", "ndcg@10": 0.5},
)  # fmt: skip


@pytest.fixture
def model(load_tiny, tmp_path) -> Path:
    """The model folder of a run."""
    folder = tmp_path / "run" / "model"
    load_tiny("bert").save_pretrained(folder)
    configuration = {"model_name_or_path": "org/base", "train_dataset": "org/data", "loss_type": "listwise_ce"}
    (tmp_path / "run" / "training_config.yaml").write_text(yaml.safe_dump(configuration))
    write_card(folder, tmp_path / "run", About("run"), RERANKER)
    return folder


@pytest.fixture
def evaluation(tmp_path) -> Path:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "result.json").write_text(json.dumps(RESULT))
    return tmp_path / "evaluation"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(hub, *arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_XET"] = "1"  # more than a test should imitate; LFS carries the same files
    command = [sys.executable, "-m", "rag_retrieval.cli", "push", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_a_folder_that_another_command_writes_to_is_refused(model, tmp_path, capsys):
    arguments = ["push", "--model", str(model), "--repo_id", "org/name", "--dry_run", str(tmp_path / "look")]
    with locked(lock_file_of(tmp_path / "look"), "busy"):
        assert main(arguments) == 2
    assert str(tmp_path / "look") in capsys.readouterr().err and not (tmp_path / "look").exists()
    assert main(arguments) == 0
    assert not lock_file_of(tmp_path / "look").exists()


def test_the_command_sends_the_staged_files_and_shows_no_token(model, evaluation, tmp_path):
    arguments = ["--model", str(model), "--repo_id", "org/name", "--language", "en,zh", "--license", "mit",
                 "--evaluations", str(evaluation)]  # fmt: skip
    before = contents(model)
    with fake_hub() as hub:
        done = push(hub, *arguments, "--commit_message", "First try")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/org/name" in done.stdout
    assert hub.created[0]["name"] == "name" and hub.created[0]["organization"] == "org"
    assert hub.created[0]["visibility"] == "private"
    assert hub.messages == ["First try"] and f"Bearer {TOKEN}" in hub.tokens
    stage(model, tmp_path / "staged", "org/name", language=("en", "zh"), license="mit", evaluations=[evaluation])
    assert hub.files == contents(tmp_path / "staged")
    assert hub.files["model.safetensors"] == before["model.safetensors"] and before == contents(model)
    card = hub.files["README.md"].decode()
    assert "- zh" in card and "license: mit" in card and "0.7500" in card and 'Reranker("org/name")' in card
    assert TOKEN not in done.stdout + done.stderr and all(TOKEN.encode() not in file for file in hub.files.values())
    assert not list(model.parent.glob(".push*"))


def test_a_public_repository_is_made_only_where_it_is_asked_for(model):
    with fake_hub() as hub:
        done = push(hub, "--model", str(model), "--repo_id", "org/name", "--private", "false")
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["visibility"] == "public"


def test_a_hub_that_refuses_is_one_line_without_the_token(model):
    with fake_hub(refuse=True) as hub:
        done = push(hub, "--model", str(model), "--repo_id", "org/name")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] and "401" in done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr and hub.files == {}


def test_a_dry_run_fills_a_folder_and_needs_no_network(model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    staged = tmp_path / "look"
    assert main(["push", "--model", str(model), "--repo_id", "org/name", "--dry_run", str(staged)]) == 0
    assert "what would be uploaded to org/name" in capsys.readouterr().out
    expected = contents(model).keys()
    assert contents(staged).keys() == expected and {"README.md", "config.json", "model.safetensors"} <= expected
    assert main(["push", "--model", str(model), "--repo_id", "org/name", "--dry_run", str(staged)]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_a_dry_run_without_a_folder_is_refused(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", "--model", str(model), "--repo_id", "org/name", "--dry_run", "true"]) == 2
    assert "--dry_run: expected a folder to write to, found true" in capsys.readouterr().err
    assert not list(tmp_path.glob("true"))


def test_hidden_and_temporary_files_are_left_out(model, tmp_path):
    expected = contents(model).keys()
    for name in (".env", ".git/config", "config.json.tmp", ".cache/x.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("secret")
    stage(model, tmp_path / "staged", "org/name")
    assert contents(tmp_path / "staged").keys() == expected


def test_a_card_of_ours_is_rewritten_for_the_upload_and_kept_beside_the_model(model, tmp_path):
    own = (model / "README.md").read_text()
    stage(model, tmp_path / "staged", "org/name", license="mit")
    staged = (tmp_path / "staged" / "README.md").read_text()
    assert "# org/name" in staged and "license: mit" in staged and "base_model: org/base" in staged
    assert (model / "README.md").read_text() == own and "# run\n" in own


def test_an_edited_card_is_uploaded_as_it_is_and_takes_no_options(model, evaluation, tmp_path):
    changed = (model / "README.md").read_text().replace(MARK, "") + "\nMy own words.\n"
    (model / "README.md").write_text(changed)
    stage(model, tmp_path / "staged", "org/name")
    assert (tmp_path / "staged" / "README.md").read_text() == changed
    for options in ({"license": "mit"}, {"language": ["en"]}, {"evaluations": [evaluation]}):
        with pytest.raises(ValueError, match="README.md: it was edited, so it goes as it is"):
            stage(model, tmp_path / "other", "org/name", **options)


def test_a_model_that_was_moved_away_from_its_run_keeps_the_card_of_the_run(model, tmp_path):
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    model.rename(moved)
    stage(moved, tmp_path / "staged", "org/name")
    assert (tmp_path / "staged" / "README.md").read_bytes() == (moved / "README.md").read_bytes()
    with pytest.raises(ValueError, match="its run is not beside it"):
        stage(moved, tmp_path / "other", "org/name", license="mit")
    (moved / "README.md").unlink()
    stage(moved, tmp_path / "other", "org/name", license="mit")
    assert "license: mit" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/-name", "org/na me", ""])
def test_a_name_that_no_hub_takes_is_refused_before_anything_is_sent(model, repo_id):
    with pytest.raises(ValueError):
        push_to_hub(model, repo_id)
    assert not list(model.parent.glob(".push*"))


def test_a_folder_without_a_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="a run keeps its model in"):
        stage(model.parent, tmp_path / "staged", "org/name")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights in it"):
        stage(model, tmp_path / "staged", "org/name")
    with pytest.raises(ValueError, match="no such folder"):
        stage(tmp_path / "nothing", tmp_path / "staged", "org/name")


@pytest.mark.parametrize("text, expected", [("{", "no JSON file"), ("{}", "it has no baseline"), ("[]", "it has no")])
def test_what_is_no_evaluation_is_named(model, evaluation, tmp_path, text, expected):
    (evaluation / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"evaluations: .*result.json is no .*{expected.removeprefix('no ')}"):
        stage(model, tmp_path / "staged", "org/name", evaluations=[evaluation])
    for config in (5, [], {}, {"model": 5}):
        (evaluation / "result.json").write_text(json.dumps(RESULT | {"config": config}))
        with pytest.raises(ValueError, match="result.json: damaged"):
            stage(model, tmp_path / "staged", "org/name", evaluations=[evaluation])
    (evaluation / "result.json").unlink()
    with pytest.raises(ValueError, match="evaluations: .*result.json cannot be read: No such file"):
        stage(model, tmp_path / "staged", "org/name", evaluations=[evaluation])


def test_figures_of_another_model_are_refused_and_those_of_this_one_taken(model, evaluation, tmp_path):
    for measured in (model, model.parent):
        result = RESULT | {"config": {"split": "test", "model": str(measured)}}
        (evaluation / "result.json").write_text(json.dumps(result))
        if measured == model:
            stage(model, tmp_path / "staged", "org/name", evaluations=[evaluation])
        else:
            with pytest.raises(ValueError, match=f"result.json is of {measured}, and not of {model}"):
                stage(model, tmp_path / "other", "org/name", evaluations=[evaluation])


def test_the_command_names_its_keys_and_has_none_for_a_token(capsys):
    assert main(["push", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--dry_run" in shown and "token" not in shown
    assert main(["push", "--model", ".", "--repo_id", "a/b", "--token", "x"]) == 2
    assert "--token: unknown key" in capsys.readouterr().err


def test_a_link_out_of_the_folder_is_refused_and_one_into_the_hub_s_cache_is_not(load_tiny, tmp_path):
    cached = tmp_path / "models--a--b" / "snapshots" / "123"
    load_tiny("bert").save_pretrained(cached)
    blob = tmp_path / "models--a--b" / "blobs" / "0f"
    blob.parent.mkdir()
    (cached / "config.json").rename(blob)
    (cached / "config.json").symlink_to(blob)
    stage(cached, tmp_path / "staged", "org/name")
    assert (tmp_path / "staged" / "config.json").read_bytes() == blob.read_bytes()
    (tmp_path / "id_rsa").write_text("key")
    (cached / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ValueError, match="notes.txt is a link to .*id_rsa"):
        stage(cached, tmp_path / "again", "org/name")
    assert not (tmp_path / "again").exists()


def test_a_dry_run_refuses_a_name_that_no_hub_takes(model, tmp_path):
    with pytest.raises(ValueError, match="a//b"):
        stage(model, tmp_path / "staged", "a//b")


def test_a_text_for_private_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="private must be True or False, found 'false'"):
        push_to_hub(tmp_path / "nowhere", "org/name", private="false")


def test_an_embedder_gets_the_card_of_one(tmp_path):
    folder = tmp_path / "embedder"
    EmbeddingModel.from_pretrained(tiny_bert(tmp_path / "base"), prompts={"query": "find: "}).save_pretrained(folder)
    stage(folder, tmp_path / "look", "org/name", language=["en"])
    text = (tmp_path / "look" / "README.md").read_text()
    assert 'SentenceTransformer("org/name")' in text and "query: find: " in text and "- en" in text
    assert contents(tmp_path / "look").keys() == contents(folder).keys() | {"README.md"}


def test_a_pre_trained_encoder_keeps_the_card_of_one(tmp_path):
    folder = tmp_path / "run" / "model"
    EmbeddingModel.from_pretrained(tiny_bert(tmp_path / "base")).save_pretrained(folder)
    configuration = {"task": "pretrain", "model_name_or_path": "org/base", "loss_type": "retromae"}
    (tmp_path / "run" / "training_config.yaml").write_text(yaml.safe_dump(configuration))
    stage(folder, tmp_path / "look", "org/name")
    text = (tmp_path / "look" / "README.md").read_text()
    assert "RetroMAE" in text and "pipeline_tag: fill-mask" in text and "--task embedding" in text
