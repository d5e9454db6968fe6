"""Trains several configurations one after another in the processes that a launcher started; for tests only.

    accelerate launch --config_file FILE tests/engine_runs.py cases.json

cases.json: name of a case to the keys of its configuration. Starting processes takes longer than a tiny training,
so they are started once. A run ends its process group, and an ended one cannot be created
again, so here it is kept.
"""

import json
import os
import sys
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    import fsdp_on_cpu  # noqa: F401
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate.state import PartialState  # noqa: E402
from torch import nn  # noqa: E402
from training_runs import train  # noqa: E402

from rag_retrieval.core.log import set_up_logging  # noqa: E402
from rag_retrieval.models import cpu_products  # noqa: E402
from rag_retrieval.train.script import leave  # noqa: E402

PartialState.destroy_process_group = lambda self, group=None: None


hidden_dtypes: set[str] = set()


def note_dtype(module: nn.Module, inputs: tuple, output) -> None:
    """What a layer in the middle of the model computes in: of BERT and of Qwen2."""
    if type(module).__name__ in ("BertIntermediate", "Qwen2MLP") and module.training:
        hidden_dtypes.add(str(output.dtype))


def main() -> int:
    set_up_logging()
    nn.modules.module.register_module_forward_hook(note_dtype)
    for name, values in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"case {name}", file=sys.stderr)
        hidden_dtypes.clear()
        cpu_products.onednn_is_faster = lambda onednn=name == "onednn": onednn  # the same on every processor
        train(values)
        (Path(values["output_dir"]) / "hidden_dtypes.json").write_text(json.dumps(sorted(hidden_dtypes)))
    return 0


if __name__ == "__main__":
    leave(main())
