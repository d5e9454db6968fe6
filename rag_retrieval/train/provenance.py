"""What a checkpoint was made of: configuration, data, engine and library versions, beside its weights.

Data are identified by their content, not by their path, so that a run can be resumed on another machine.
"""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from rag_retrieval import __version__
from rag_retrieval.core.files import read_json, write_json
from rag_retrieval.train.run_folder import PROVENANCE_FILE


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


def engine_of(accelerator: Accelerator) -> str:
    """DDP (one process and many write the same files), FSDP, or DeepSpeed ZeRO with its stage."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "DDP"
