"""How many functions, in how many files, a `rerank` call and a training run enter, and every one by name.

    python benchmarks/count_calls.py [--of WORKTREE] [--names]

Counts distinct functions of `rag_retrieval` that `sys.setprofile` sees, in all threads: lambdas, comprehensions, class
bodies and generated code are not counted, nor what libraries do. With `--of` it counts another checkout, such as a git
worktree of an older commit. The model is a tiny random BERT, the query has three documents, the training run is one
step long, from the YAML file to the saved model.
"""

import argparse
import inspect
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

DOCUMENTS = ["Water boils at 100 degrees.", "Paris is the capital of France.", "Rest and water may help."]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", type=Path, default=Path(__file__).resolve().parents[1], help="checkout to count")
    parser.add_argument("--names", action="store_true", help="list every function")
    options = parser.parse_args(arguments)
    checkout = options.of.resolve()
    sys.path[:0] = [str(checkout), str(checkout / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAG_RETRIEVAL_CACHE"] = f"{folder}/cache"
        for name, work in works(Path(folder)).items():
            report(name, functions_of(work, checkout / "rag_retrieval"), options.names)


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """What is counted, ready to be called."""
    from tiny_models import tiny_bert

    from rag_retrieval import Reranker

    model = tiny_bert(folder / "model", head_labels=1)
    reranker = Reranker(model, device="cpu")
    reranker.rerank("where is Paris?", DOCUMENTS)
    data = folder / "train.jsonl"
    record = {"query": "where is Paris?", "pos": DOCUMENTS[1:2], "neg": [DOCUMENTS[0], DOCUMENTS[2]]}
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(4)), encoding="utf-8")
    return {
        "rerank": lambda: reranker.rerank("where is Paris?", DOCUMENTS),
        "training run of one step": lambda: train(tiny_bert(folder / "base"), data, folder / "run"),
    }


def train(model: str, data: Path, output_dir: Path) -> None:
    from rag_retrieval.train.reranker import train_reranker

    values = {
        "model_name_or_path": model, "model_type": "bert_encoder", "train_dataset": str(data),
        "train_dataset_type": "grouped", "train_group_size": 3, "loss_type": "listwise_ce",
        "output_dir": str(output_dir), "max_len": 64, "batch_size": 4, "epochs": 1, "mixed_precision": "no",
        "num_workers": 0,
    }  # fmt: skip
    config = data.with_suffix(".yaml")
    config.write_text(json.dumps(values), encoding="utf-8")
    with suppress(SystemExit):
        train_reranker.main(["--config", str(config)])


class Profile:
    """The functions of a package that are entered while it is on."""

    def __init__(self, package: Path):
        self.package, self.seen = str(package) + os.sep, set()

    def __call__(self, frame, event: str, _) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")  # no class, no lambda
        if event == "call" and is_function and code.co_filename.startswith(self.package):
            self.seen.add((code.co_filename.removeprefix(self.package), code.co_qualname))

    def __enter__(self) -> "Profile":
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *error) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def functions_of(work: Callable[[], object], package: Path) -> set[tuple[str, str]]:
    """(file, qualified name) of every function of the package that the work enters."""
    with Profile(package) as profile:
        work()
    return profile.seen


def report(name: str, seen: set[tuple[str, str]], names: bool) -> None:
    files = Counter(file for file, _ in seen)
    print(f"{name}: {len(seen)} functions in {len(files)} files")
    if names:
        for file in sorted(files):
            print(f"  {file}: {', '.join(sorted(function for place, function in seen if place == file))}")


if __name__ == "__main__":
    main()
