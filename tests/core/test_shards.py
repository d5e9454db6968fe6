"""Work as files: every shard whole and once, whoever is killed, and never mixed with other work."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
from functools import cache
from pathlib import Path

import pytest
from shard_samples import LIMIT, contents, lines, wait_until, work

from rag_retrieval.core.shard_folder import ShardFolder, make_locally
from rag_retrieval.core.shards import run_shards

FORK = multiprocessing.get_context("fork")
MADE_FROM = {"model": "m1", "length": 64}


def run(tmp_path: Path, made_from=MADE_FROM, count=5, overwrite=False, **arguments) -> list[Path]:
    sizes = [10] * count
    return run_shards(tmp_path / "work", made_from, sizes, work(tmp_path, **arguments), overwrite=overwrite)


def test_shards_are_made_once_and_their_folders_returned_in_order(tmp_path):
    paths = run(tmp_path)
    assert paths == [tmp_path / "work" / f"shard-00000{number}" for number in range(5)]
    assert [(path / "number").read_text() for path in paths] == [f"a{number}" * 1000 for number in range(5)]
    assert json.loads((tmp_path / "work" / "manifest.json").read_text()) == {"made_from": MADE_FROM, "shards": 5}
    assert sorted(path.name for path in (tmp_path / "work").iterdir())[0] == "manifest.json", "nothing hidden is left"
    assert run(tmp_path) == paths
    assert lines(tmp_path / "made") == list("01234") and lines(tmp_path / "opened") == [f"cpu {os.getcwd()}"]


def test_no_shards_are_no_work(tmp_path):
    assert run(tmp_path, count=0) == [] and not lines(tmp_path / "opened")


def test_an_error_keeps_the_finished_shards_and_the_next_call_goes_on(tmp_path):
    with pytest.raises(ValueError, match="shard 3 has a bad text"):
        run(tmp_path, failing=3)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        "manifest.json", "shard-000000", "shard-000001", "shard-000002"]  # fmt: skip
    run(tmp_path)
    assert lines(tmp_path / "made") == list("01234")


@pytest.mark.parametrize("change", [{"length": 128}, {"prompt": "query: "}, {"length": None}])
def test_work_made_from_something_else_is_refused_by_name_unless_overwritten(tmp_path, change):
    run(tmp_path)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"differs:\n  {name}: was {MADE_FROM.get(name)!r}, now {value!r}\nRestore"):
        run(tmp_path, MADE_FROM | change)
    assert len(lines(tmp_path / "made")) == 5
    (path, *_) = run(tmp_path, MADE_FROM | change, overwrite=True, text="b")
    assert (path / "number").read_text()[:2] == "b0" and len(lines(tmp_path / "made")) == 10


def test_another_number_of_shards_is_other_work(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="shards: was 5, now 3"):
        run(tmp_path, count=3)


@pytest.mark.parametrize("text", ["", "{", '{"shards": 5}'])
def test_finished_shards_under_a_damaged_manifest_are_refused(tmp_path, text):
    run(tmp_path)
    (tmp_path / "work" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json is missing or damaged"):
        run(tmp_path)


def test_a_job_without_a_finished_shard_does_not_bind_the_next(tmp_path):
    with pytest.raises(ValueError, match="bad text"):
        run(tmp_path, {"model": "wrong"}, failing=0)
    run(tmp_path, {"model": "right"})
    with pytest.raises(ValueError, match="model: was 'right', now 'wrong'"):
        run(tmp_path, {"model": "wrong"})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, overwrite):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="work is where finished work is kept.*notes.txt"):
        run(tmp_path, overwrite=overwrite)
    assert contents(tmp_path / "work") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_a_file_in_place_of_the_folder_is_refused(tmp_path, kind):
    (tmp_path / "elsewhere" / "shard-000000").mkdir(parents=True)
    if kind == "link":
        (tmp_path / "work").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "work").write_text("mine")
    with pytest.raises(ValueError, match="it is not of this program"):
        run(tmp_path, overwrite=True)
    assert (tmp_path / "elsewhere" / "shard-000000").is_dir()


def test_removing_leaves_what_others_put_there(tmp_path):
    run(tmp_path)
    (tmp_path / "work" / "notes.txt").write_text("mine")
    ShardFolder(tmp_path / "work").remove()
    assert contents(tmp_path).keys() == {"made", "begun", "opened", "work/notes.txt"}
    (tmp_path / "work" / "notes.txt").unlink()
    ShardFolder(tmp_path / "work").remove()
    assert not (tmp_path / "work").exists()


def test_a_full_disk_is_an_error_and_leaves_no_half_shard(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(tmp_path / "work").keys() == {"manifest.json"}
    assert len(run(tmp_path)) == 5


def test_what_a_shard_yields_is_shown_and_the_rest_when_it_is_there(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("rag_retrieval.core.log.Progress.update", lambda self, count: shown.append(count))
    run(tmp_path, count=2, yields=4)
    assert shown == [4, 6, 4, 6]


# --- several processes ---


def nothing(number: int, count: int | None = None) -> None:
    """Reports nothing."""


def share(tmp_path: Path, count: int, **arguments) -> multiprocessing.Process:
    """A process that works with others on the folder, as one of `accelerate launch` does."""
    (tmp_path / "work").mkdir(exist_ok=True)
    shards, opened = ShardFolder(tmp_path / "work"), work(tmp_path, **arguments).open_here
    process = FORK.Process(target=make_locally, args=(shards, list(range(count)), cache(opened), nothing), daemon=True)
    process.start()
    return process


def test_processes_share_the_shards_and_all_wait_for_the_last_one(tmp_path):
    first = share(tmp_path, 20, wait_at=(0,), wait_for="go")  # a slow one: the other takes all the rest
    wait_until(lambda: lines(tmp_path / "begun") == ["0"])
    second = share(tmp_path, 20)
    wait_until(lambda: len(lines(tmp_path / "made")) == 19)
    assert first.is_alive() and second.is_alive() and not (tmp_path / "work" / "shard-000000").exists()
    (tmp_path / "go").touch()
    for process in (first, second):
        process.join(LIMIT)
        assert process.exitcode == 0
    assert sorted(map(int, lines(tmp_path / "made"))) == list(range(20)) and len(lines(tmp_path / "opened")) == 2


def test_the_shard_of_a_killed_process_is_made_by_another(tmp_path):
    killed = share(tmp_path, 6, killing=2)
    killed.join(LIMIT)
    assert killed.exitcode == -signal.SIGKILL and lines(tmp_path / "made") == ["0", "1"]
    other = share(tmp_path, 6)
    other.join(LIMIT)
    assert other.exitcode == 0 and lines(tmp_path / "made") == list("012345")
    assert list((tmp_path / "work").glob(".shard-*.tmp")), "what was half written lies aside"
    (tmp_path / "work" / "manifest.json").write_text(json.dumps({"made_from": MADE_FROM, "shards": 6}))
    run(tmp_path, count=6)
    assert not list((tmp_path / "work").glob(".*")) and lines(tmp_path / "made") == list("012345")


def test_a_process_that_outlived_its_job_is_waited_for_and_not_disturbed(tmp_path):
    with pytest.raises(ValueError, match="bad text"):
        run(tmp_path, failing=1)
    orphan = share(tmp_path, 3, wait_at=(1,), wait_for="go")
    wait_until(lambda: lines(tmp_path / "begun") == ["0", "1", "1"])
    with pytest.raises(ValueError, match="a process of an earlier job still works here"):
        run(tmp_path, {"model": "m2"}, overwrite=True)
    next_job = FORK.Process(target=run, args=(tmp_path,), kwargs={"count": 5}, daemon=True)
    next_job.start()
    wait_until(lambda: lines(tmp_path / "made") == ["0", "2", "3", "4"])
    (tmp_path / "go").touch()
    for process in (orphan, next_job):
        process.join(LIMIT)
        assert process.exitcode == 0
    assert sorted(lines(tmp_path / "made")) == list("01234")


def test_a_second_job_in_a_folder_is_refused(tmp_path):
    first = FORK.Process(target=run, args=(tmp_path,), kwargs={"wait_at": (1,), "wait_for": "go"}, daemon=True)
    first.start()
    wait_until(lambda: lines(tmp_path / "begun") == ["0", "1"])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="work: another job works here"):
            run(tmp_path, overwrite=overwrite)
    (tmp_path / "go").touch()
    first.join(LIMIT)
    assert first.exitcode == 0 and lines(tmp_path / "made") == list("01234")


def test_without_locks_a_shard_that_another_process_finished_first_is_taken(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    shards = ShardFolder(tmp_path / "work")

    def write_first(number: int, folder: Path) -> None:
        (folder / "number").write_text("first")

    def make(number: int, folder: Path) -> None:
        (folder / "number").write_text("late")
        if not shards.is_finished(number):
            shards.make(number, lambda: write_first, nothing)

    (tmp_path / "work").mkdir()
    assert shards.make(0, lambda: make, nothing)
    assert contents(tmp_path / "work") == {"shard-000000/number": b"first"}
