"""Real Ray clusters on this machine: whoever is killed, every shard is made once, to the bytes of one process."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import psutil
import pytest
from shard_samples import LIMIT, contents, lines, wait_until, work

from rag_retrieval.core.config import EngineOptions
from rag_retrieval.core.ray_engine import plan_workers
from rag_retrieval.core.shard_folder import ShardError
from rag_retrieval.core.shards import run_shards

TESTS = Path(__file__).resolve().parents[1]
MADE_FROM = {"model": "m"}
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.mark.parametrize(
    "machines, asked, expected",
    [
        ([{"CPU": 8}], None, (1, {"num_cpus": 8})),
        ([{"CPU": 8}, {"CPU": 6}, {"memory": 5}], None, (2, {"num_cpus": 6})),
        ([{"CPU": 8}], 3, (3, {"num_cpus": 2})),
        ([{"CPU": 3}, {"CPU": 3}], 3, (3, {"num_cpus": 1})),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8}], None, (4, {"num_gpus": 1, "num_cpus": 1})),
        ([{"CPU": 8, "GPU": 4}], 2, (2, {"num_gpus": 1, "num_cpus": 1})),
    ],
)
def test_workers_fill_the_machines_or_the_gpus(machines, asked, expected):
    assert plan_workers(machines, asked) == expected


@pytest.mark.parametrize(
    "machines, asked, found",
    [
        ([{"CPU": 2}], 3, "0 GPUs and 2 CPUs"),
        ([{"CPU": 8, "GPU": 1}], 2, "1 GPUs and 8"),
        ([{"memory": 1}], None, "0 CPUs"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(machines, asked, found):
    with pytest.raises(ValueError, match=f"ray_workers: the cluster has .*{found}"):
        plan_workers(machines, asked)


def run(root: Path, engine: EngineOptions, count: int = 8, **arguments) -> dict[str, bytes]:
    root.mkdir(exist_ok=True)
    run_shards(root / "work", MADE_FROM, [10] * count, work(root, **arguments), engine)
    return contents(root / "work")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense:x"])  # auto finds any cluster of this machine
def test_an_address_without_a_cluster_is_refused(tmp_path, address):
    with pytest.raises(ValueError, match="ray_address: "):
        run(tmp_path, EngineOptions(engine="ray", ray_address=address))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, bytes]:
    return run(tmp_path_factory.mktemp("local"), EngineOptions())


@pytest.fixture(scope="module")
def cluster():
    """Three nodes: two with a CPU, and one that can be taken away. Workers find the tests' modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = importlib.import_module("ray.cluster_utils").Cluster(
            initialize_head=True, head_node_args={**NODE, "include_dashboard": False}
        )
        cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


def engine(cluster, workers: int = 2) -> EngineOptions:
    return EngineOptions(engine="ray", ray_address=cluster.address, ray_workers=workers)


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_make_the_bytes_of_one_process(tmp_path, cluster, one_process):
    assert run(tmp_path, engine(cluster), killing=3) == one_process
    assert sorted(lines(tmp_path / "made")) == list("01234567"), "no shard is made twice"
    assert len(lines(tmp_path / "killed")) == 1 and lines(tmp_path / "begun").count("3") == 2
    assert set(lines(tmp_path / "opened")) == {f"cpu {os.getcwd()}"} and not list((tmp_path / "work").glob(".*"))


@pytest.mark.slow
def test_the_other_worker_makes_all_the_rest_while_one_is_slow(tmp_path, cluster, one_process):
    def let_go() -> None:
        wait_until(lambda: len(lines(tmp_path / "made")) == 7)
        (tmp_path / "go").touch()

    watcher = Thread(target=let_go, daemon=True)
    watcher.start()
    assert run(tmp_path, engine(cluster), wait_at=(0,), wait_for="go") == one_process
    watcher.join(LIMIT)
    assert lines(tmp_path / "made") == [*"1234567", "0"]


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_is_named_after_the_others_are_made(tmp_path, cluster):
    with pytest.raises(ShardError, match="work/shard-000003: ended 3 Ray workers"):
        run(tmp_path, engine(cluster), killing=3, kills=9)
    assert sorted(lines(tmp_path / "made")) == list("0124567")


@pytest.mark.slow
def test_a_program_that_is_connected_to_a_cluster_uses_it_and_stays_connected(tmp_path, cluster):
    ray = importlib.import_module("ray")
    ray.init(cluster.address, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match="^shard 3 has a bad text$"):
            run(tmp_path, EngineOptions(engine="ray", ray_workers=2), failing=3)
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_machine_that_leaves_is_done_without(tmp_path, cluster, one_process):
    node = cluster.add_node(**NODE)
    leaving = subprocess.Popen(
        [sys.executable, "-c", KILLER, str(tmp_path), str(node.all_processes["raylet"][0].process.pid)],
    )
    assert run(tmp_path, engine(cluster, 3), wait_at=(0, 1, 2), wait_for="go") == one_process
    assert leaving.wait(LIMIT) == 0 and sorted(lines(tmp_path / "made")) == list("01234567")


# ends a machine's Ray and its workers when every worker has begun a shard; then lets the others go on
KILLER = """
import sys
from pathlib import Path
import psutil
from shard_samples import lines, wait_until
folder, pid = Path(sys.argv[1]), int(sys.argv[2])
wait_until(lambda: len(lines(folder / "begun")) == 3)
raylet = psutil.Process(pid)
for process in [raylet, *raylet.children(recursive=True)]:
    process.kill()
(folder / "go").touch()
"""

DRIVER = """
import sys
from pathlib import Path
from rag_retrieval.core.config import EngineOptions
from rag_retrieval.core.shards import run_shards
from shard_samples import work
root = Path(sys.argv[1])
two = EngineOptions(engine="ray", ray_workers=2)
run_shards(root / "work", {"model": "m"}, [10] * 8, work(root, wait_at=(4,), wait_for="go"), two)
"""


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_the_next_call_goes_on(tmp_path, one_process):
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env=environment)
    wait_until(lambda: len(lines(tmp_path / "made")) == 7 or driver.poll() is not None)
    started = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in started if "ray::Worker" in "".join(process.cmdline())]
    driver.kill()
    driver.wait(LIMIT)
    wait_until(lambda: not any(process.is_running() for process in workers))
    assert len(workers) == 2 and sorted(lines(tmp_path / "made")) == list("0123567")
    assert run(tmp_path, EngineOptions()) == one_process
    assert sorted(lines(tmp_path / "made")) == list("01234567")
    (tmp_path / "go").touch()
