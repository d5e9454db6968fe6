"""The output folder of a run: its lock, how results come into it, and what its checkpoints are made of.

Data are identified by their content, not by their path, so that a run can be resumed on another machine.
"""

import os
import platform
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_retrieval import __version__
from rag_retrieval.core.files import flush_one, flush_to_disk, locked, read_json, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK_FILE = ".lock"
RESULTS = ("model", "adapter")
TRACKER_FOLDER = "tracking"
RUN_FILE, METRICS_FILE, PROVENANCE_FILE = "run.json", "metrics.jsonl", "provenance.json"
CONFIGURATION_FILE, DATA_FILE, START_FILE = "training_config.yaml", "data_summary.json", "validation_start.json"
WRITTEN = (*RESULTS, TRACKER_FOLDER, METRICS_FILE, PROVENANCE_FILE, CONFIGURATION_FILE, DATA_FILE, START_FILE)


class OutputFolderError(ValueError):
    """The output folder holds something that this run must not touch."""


def folder_lock(output_dir: Path) -> AbstractContextManager[None]:
    """The lock of a run on its output folder, which is made where it is missing. Raises OutputFolderError where nothing
    can be written to it, and when it is entered ValueError where another process trains there."""
    existing = next(folder for folder in (output_dir, *output_dir.resolve().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputFolderError(
            f"output_dir: {existing} is {'not writable' if existing.is_dir() else 'a file'}; take another output_dir "
            "or change its rights or mount"
        )
    busy = f"output_dir: another process is training in {output_dir}; wait for it or take another output_dir"
    return locked(output_dir / LOCK_FILE, busy)


def read_run(output_dir: Path) -> dict:
    """run_id and finished of the run in the folder; {} where there is none."""
    values = read_json(output_dir / RUN_FILE)
    return values if isinstance(values.get("run_id"), str) else {}


def check_free(output_dir: Path, earlier: dict, overwrite: bool) -> None:
    if earlier and not overwrite:
        raise OutputFolderError(
            f"{output_dir} already holds a run. Continue it: --resume auto. Keep it: another --output_dir. "
            "Replace it: --overwrite_output_dir true"
        )
    for name in WRITTEN:
        if not earlier and os.path.lexists(output_dir / name):
            raise OutputFolderError(
                f"output_dir: {output_dir / name} exists, is not of a run of this trainer, and would be replaced; "
                "move it away or take another output_dir"
            )


def publish(results: Path, output_dir: Path) -> None:
    """Give the complete folders in `results` their names in the output folder, in the place of earlier ones."""
    flush_to_disk(results)
    for folder in list(results.iterdir()):
        final = output_dir / folder.name
        if os.path.lexists(final):
            os.replace(final, results / f"old-{folder.name}")
        os.replace(folder, final)
    flush_one(output_dir)


def finish(output_dir: Path, run_id: str, model_step: int) -> None:
    """Mark the run as finished. model_step: optimizer steps behind the final model."""
    write_json(output_dir / RUN_FILE, {"run_id": run_id, "finished": True, "model_step": model_step})


# ---- what made a checkpoint ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """configuration: resolved keys of the YAML. data: name of a data set to the digest of its content.

    engine: how weights and optimizer lie on disk, see `engine_of`. processes: at least 1. versions: by library.
    """

    configuration: dict[str, Any]
    data: dict[str, str]
    engine: str
    processes: int
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        write_json(folder / PROVENANCE_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Provenance":
        """Of a checkpoint that `read_state` found complete, which covers this file."""
        return cls(**read_json(folder / PROVENANCE_FILE))


def library_versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"rag_retrieval": __version__, "python": platform.python_version(), **libraries}


def engine_of(accelerator: "Accelerator") -> str:
    """DDP (one process and many write the same files), FSDP, or DeepSpeed ZeRO with its stage."""
    if accelerator.distributed_type == "FSDP":
        return "FSDP"
    if accelerator.distributed_type == "DEEPSPEED":
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "DDP"
