"""Two nodes: two launchers on the loopback, started by the command of config/README.md, one of which is lost.

The reference is one process that was never stopped.
"""

import random
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from training_runs import ROOT, final_weights, grouped_records, train, write_yaml

pytestmark = pytest.mark.slow

PATIENCE = 600.0  # seconds


def documented_command() -> list[str]:
    text = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(accelerate launch .*?)```", text, flags=re.DOTALL)
    return shlex.split(block.replace("\\\n", " "))


def node_command(rank: int, port: int, config_file: str, script: str, config: str) -> list[str]:
    """The documented command for one of two nodes with a process each. config: the training YAML."""
    command = documented_command()
    for option, value in {
        "--config_file": config_file,
        "--main_process_ip": "127.0.0.1",
        "--num_processes": "2",
        "--machine_rank": str(rank),
        "--config": config,
    }.items():
        command[command.index(option) + 1] = value
    place = command.index("rag_retrieval/train/reranker/train_reranker.py")
    command[place : place + 1] = ["--main_process_port", str(port), script]
    assert command[:2] == ["accelerate", "launch"]
    return [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]


def free_port() -> int:
    """Below those that the system gives to connections, one of which could take it before the launchers do."""
    for port in random.Random().sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("found no free port")


class Nodes:
    """Both launchers, from start to end; ended with all their processes when the block is left."""

    def __init__(self, folder: Path, config_file: str, script: str, config: str):
        port = free_port()
        self.logs = [folder / f"node-{rank}.log" for rank in (0, 1)]
        self.launchers = []
        for rank, path in enumerate(self.logs):
            command = node_command(rank, port, config_file, script, config)
            with path.open("w") as log:
                self.launchers.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *problem) -> None:
        for rank in (0, 1):
            self.lose(rank)

    def lose(self, rank: int) -> None:
        """SIGKILL the launcher and its processes."""
        launcher = self.launchers[rank]
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()
            launcher.wait()

    def wait_for(self, path: Path) -> None:
        end = time.monotonic() + PATIENCE
        while not path.exists():
            assert all(launcher.poll() is None for launcher in self.launchers), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.05)

    def codes(self) -> list[int]:
        return [launcher.wait(timeout=PATIENCE) for launcher in self.launchers]

    def output(self) -> str:
        return "\n".join(path.read_text() for path in self.logs)


@pytest.mark.parametrize(
    "config_file, script",
    [
        ("config/fsdp_two_nodes.yaml", "tests/fsdp_on_cpu.py"),
        ("config/deepspeed/deepspeed_zero3_two_nodes.yaml", "rag_retrieval/train/reranker/train_reranker.py"),
    ],
    ids=["fsdp", "zero3"],
)
def test_two_nodes_meet_train_lose_one_and_resume(settings, tmp_path, config_file, script):
    if "deepspeed" in config_file:
        pytest.importorskip("deepspeed")
    one = settings("listwise_ce", grouped_records(45), batch_size=8, epochs=4, adam_epsilon=1e-3)
    train(one)
    two = one | {"batch_size": 4, "output_dir": str(tmp_path / "two"), "save_steps": 2, "resume": "auto"}
    arguments = (config_file, script, write_yaml(tmp_path / "two.yaml", two))
    with Nodes(tmp_path, *arguments) as nodes:
        nodes.wait_for(tmp_path / "two" / "checkpoint-4")
        nodes.lose(1)
        assert nodes.codes()[0] != 0, "the first node must not go on alone"
    assert not (tmp_path / "two" / "model").exists(), "the run was lost before its end"
    with Nodes(tmp_path, *arguments) as nodes:
        assert nodes.codes() == [0, 0], nodes.output()
        assert "resuming from" in nodes.output()
    first, second = (final_weights(values["output_dir"]) for values in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=0)
