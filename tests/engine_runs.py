"""Trains several configurations one after another in the processes that a launcher started; for tests only.

    accelerate launch --config_file FILE tests/engine_runs.py cases.json

cases.json: name of a case to the keys of its configuration. Starting processes takes longer than a tiny training,
so they are started once. What a reader would get wrong: a run ends its process group, and one that was ended
cannot be made anew, so here it is kept.
"""

import json
import os
import sys
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    import fsdp_on_cpu  # noqa: F401
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate.state import AcceleratorState, PartialState  # noqa: E402

from rag_retrieval.core.command import set_up_logging  # noqa: E402
from rag_retrieval.train.reranker.run import run  # noqa: E402
from rag_retrieval.train.reranker.train_reranker import leave  # noqa: E402
from rag_retrieval.train.reranker.training_config import TrainingConfig  # noqa: E402

PartialState.destroy_process_group = lambda self, group=None: None


def main() -> int:
    set_up_logging()
    for name, values in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"case {name}", file=sys.stderr)
        AcceleratorState._reset_state(True)
        run(TrainingConfig(**values))
    return 0


if __name__ == "__main__":
    leave(main())
