"""Starts the trainer under real FSDP2 on a machine without an accelerator; for tests only.

Accelerate decides the engine from the device it finds, so it is told that gloo on the CPU serves many
devices; and the trainer's own turn to plain data parallelism is switched off.
"""

import os
import sys
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from rag_retrieval.train import launch  # noqa: E402
from rag_retrieval.train.reranker.train_reranker import leave, main  # noqa: E402

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
launch.adapt_to_cpu = lambda: None

if __name__ == "__main__":
    leave(main())
