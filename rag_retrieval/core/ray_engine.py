"""The engine `ray` of `core.shards`: actors of a Ray cluster hold the model, one for each device, and make the shards.

This process, the driver, hands every free actor the next shard. An actor that dies, alone or with its machine, is
replaced where the cluster has room, and its shard is made by another. When the driver dies, Ray ends the actors, and
the same command continues. What is exchanged are numbers of shards: the actors read and write the files themselves.
"""

import os
import signal
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from rag_retrieval.core.config import EngineOptions
from rag_retrieval.core.distributed import SLOWEST
from rag_retrieval.core.shard_folder import ShardError, ShardFolder, ShardWork, make_locally

DEATHS = 3  # of workers over one shard, or one after the other before any shard is made
SLOWEST_START = timedelta(minutes=30)  # of all workers: a place in the cluster, and the model
ANSWERS_WITHIN = 30.0  # seconds
SHOWN = 500  # characters of Ray's message
OBJECT_STORE = 100 << 20  # bytes; Ray's default is a third of the memory, and nothing is exchanged
PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])


class Worker:
    """An actor. here: the current folder of the driver."""

    def __init__(self, here: str, shards: ShardFolder, work: ShardWork):
        if os.path.isdir(here):
            os.chdir(here)
        self.shards, self.opened = shards, cache(work.open_here)

    def open(self) -> None:
        self.opened()

    def make(self, number: int) -> None:
        make_locally(self.shards, [number], self.opened, lambda number, count=None: None)


def make_with_ray(
    shards: ShardFolder, missing: list[int], work: ShardWork, engine: EngineOptions, report: Callable[[int], None]
) -> None:
    """Returns when all of the missing shards are there. Raises ShardError for a shard that ended `DEATHS` workers, and
    where nothing happens within the bounds; otherwise as `run_shards`."""
    shards = ShardFolder(shards.folder.absolute())
    with ray_cluster(engine) as ray:
        count, needs = plan_workers([node["Resources"] for node in ray.nodes() if node["Alive"]], engine.ray_workers)
        path = os.pathsep.join(filter(None, [PACKAGE_FOLDER, os.environ.get("PYTHONPATH")]))
        actor_class = ray.remote(Worker).options(
            **needs, max_restarts=0, scheduling_strategy="SPREAD", runtime_env={"env_vars": {"PYTHONPATH": path}}
        )
        driver = Driver(ray, lambda: actor_class.remote(os.getcwd(), shards, work), shards)
        driver.make(deque(missing), min(count, len(missing)), report)
        for number in missing:
            if not shards.is_finished(number):
                where = f"{shards.path(number)}: a Ray worker made it, and it is not here"
                raise ShardError(f"{where}; give a folder that all machines of the cluster see under this name")


class Driver:
    def __init__(self, ray: Any, new_actor: Callable[[], Any], shards: ShardFolder):
        self.ray, self.new_actor, self.shards = ray, new_actor, shards
        self.tasks: dict[Any, tuple[Any, int | None]] = {}  # actor and number of its shard; None: it opens the model
        self.deaths: Counter[int | None] = Counter()

    def make(self, waiting: deque[int], workers: int, report: Callable[[int], None]) -> None:
        try:
            self._make(waiting, workers, report)
        finally:
            # kept by a traceback, they would end actors of the same numbers in this process's next session of Ray
            self.tasks.clear()

    def _make(self, waiting: deque[int], workers: int, report: Callable[[int], None]) -> None:
        for _ in range(workers):
            self._start_worker()
        while waiting or any(number is not None for _, number in self.tasks.values()):
            for task in self._next_ended():
                actor, number = self.tasks.pop(task)
                try:
                    self.ray.get(task)
                except self.ray.exceptions.RayActorError as error:
                    del actor
                    self._count_death(number, error)
                    waiting.extend([] if number is None else [number])  # last: the others are made before it
                    self._start_worker()
                    continue
                except self.ray.exceptions.RayTaskError as error:
                    del actor
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                if number is not None:
                    del self.deaths[None]
                    report(number)
                if waiting:
                    number = waiting.popleft()
                    self.tasks[actor.make.remote(number)] = actor, number

    def _start_worker(self) -> None:
        actor = self.new_actor()
        self.tasks[actor.open.remote()] = actor, None

    def _next_ended(self) -> list[Any]:
        numbers = [number for _, number in self.tasks.values() if number is not None]
        limit = SLOWEST if numbers else SLOWEST_START
        ended, _ = self.ray.wait(list(self.tasks), timeout=limit.total_seconds())
        if ended:
            return ended
        if numbers:
            raise ShardError(f"{self.shards.path(numbers[0])}: no Ray worker has finished a shard within {limit}")
        free = {name: self.ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
        raise ShardError(f"no Ray worker was ready within {limit}; the cluster has free: {free}")

    def _count_death(self, number: int | None, error: Exception) -> None:
        self.deaths[number] += 1
        if self.deaths[number] == DEATHS:
            what = "opening the model" if number is None else self.shards.path(number)
            text = " ".join(str(error).split())[:SHOWN]
            raise ShardError(f"{what}: ended {DEATHS} Ray workers, one after the other; of the last Ray says: {text}")


def plan_workers(machines: list[dict[str, float]], asked: int | None) -> tuple[int, dict[str, int]]:
    """How many workers, and what Ray keeps for each: a GPU, or CPUs, which are the threads that torch uses.

    machines: what each has, in Ray's words. asked: None for a worker on each GPU or, without any, on each machine.
    """
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    cpus = [int(machine.get("CPU", 0)) for machine in machines if machine.get("CPU", 0) >= 1]
    if gpus:
        room, needs = {1: gpus}, {"num_gpus": 1, "num_cpus": 1}
    else:
        asked = asked or len(cpus)
        room = {threads: sum(each // threads for each in cpus) for threads in range(1, max(cpus, default=1) + 1)}
        needs = {"num_cpus": max((threads for threads in room if room[threads] >= asked), default=1)}
    if not 0 < (asked or gpus) <= room[1]:
        found = f"the cluster has {gpus} GPUs and {sum(cpus)} CPUs"
        raise ValueError(f"ray_workers: {found}; expected at least {asked or 1}{' GPUs' if gpus else ''}")
    return asked or gpus, needs


@contextmanager
def ray_cluster(engine: EngineOptions) -> Iterator[Any]:
    """Ray, connected for the time of the block, unless the program is connected already. Without an address: to a
    cluster of its own, whose processes end with the block. Raises ValueError where no cluster is at the address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # reports to Ray's makers
    import ray

    if ray.is_initialized():
        yield ray
        return
    on_term = signal.getsignal(signal.SIGTERM)
    address, own = engine.ray_address or "local", {}
    host, colon, port = address.rpartition(":")
    try:
        if colon:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"ray_address: nothing answers at {address} ({error}); expected HOST:PORT, or auto") from error
    if engine.ray_address is None:
        cpus = max(len(os.sched_getaffinity(0)), engine.ray_workers or 1)  # more workers than CPUs take turns
        own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "num_cpus": cpus}
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, **own)
    except ConnectionError as error:
        raise ValueError(f"ray_address: {error}") from error
    with suppress(ValueError):  # outside the main thread Ray changes nothing
        signal.signal(signal.SIGTERM, on_term)
    try:
        yield ray
    finally:
        ray.shutdown()
