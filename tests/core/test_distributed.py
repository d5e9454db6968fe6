import sys

import pytest
from training_runs import launch

# what a command does under a launcher; the names of the threads that are left of it
ENDED_GROUP = """
import sys
from contextlib import suppress
from pathlib import Path
from rag_retrieval.core.distributed import on_main, process_group
with process_group():
    from rag_retrieval import CrossEncoder
    scorer = CrossEncoder.from_pretrained(sys.argv[1])
    on_main(lambda: scorer.compute_score(["q", "d"]))
names = []
for task in Path("/proc/self/task").iterdir():
    with suppress(OSError):  # a thread of another library has ended meanwhile
        names.append((task / "comm").read_text().strip())
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.slow
def test_no_thread_of_a_group_of_processes_outlives_it(model_folders, tmp_path):
    script = tmp_path / "ended_group.py"
    script.write_text(ENDED_GROUP)
    options = ["--nproc_per_node", "2", "--standalone"]
    done = launch(
        ["torch.distributed.run", *options, str(script), model_folders["bert"]], PYTHONPATH=":".join(sys.path)
    )
    assert done.returncode == 0, done.stderr
