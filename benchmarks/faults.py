"""Kills and hurts real trainings, resumes each, and compares the final weights with those of an undisturbed run.

    python benchmarks/faults.py [--task embedding | unified | pretrain] [--quick] [--folder FOLDER] [--seed 0]

A tiny BERT with dropout, accumulation, validation, early rotation and a data loading process, alone and as two
processes under torchrun's launcher on the CPU. Prints a table; exits with 1 if any run hung, could not resume, or
ended with other weights.

"Equal" is bitwise, of every tensor. A run that was only slowed down is compared without being resumed.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_runs import Fault, Outcome, start

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from tiny_models import tiny_bert
from training_runs import embedding_records, grouped_records, plain_texts, write_jsonl, write_yaml
from unified_runs import all_weights

STEPS = 24  # of the whole run: 2 epochs of 12
RECORDS_PER_STEP, EPOCHS = 4, 2


RERANKER = {"model_type": "bert_encoder", "max_len": 48, "train_dataset_type": "grouped", "loss_type": "listwise_ce"}
EMBEDDER = {  # its micro-batches are cut by tokens, and some are encoded twice
    "task": "embedding", "query_max_len": 24, "passage_max_len": 48, "loss_type": "info_nce", "temperature": 0.05,
    "max_tokens_per_batch": 64, "max_tokens_with_graph": 100, "eval_on_start": False,
}  # fmt: skip
UNIFIED = EMBEDDER | {  # faults come before and after the step at which the distillation begins
    "representations": ["dense", "lexical", "multi_vector"], "use_self_distill": True, "self_distill_start_step": 8,
}  # fmt: skip
PRETRAINING = {"task": "pretrain", "max_len": 48, "loss_type": "retromae", "bag_of_words_weight": 0.2}
# keys, records, and how many of them for STEPS; the last step of a reranker's epoch is short
TASKS = {
    "reranker": (RERANKER, grouped_records, 45),
    "embedding": (EMBEDDER, embedding_records, 48),
    "unified": (UNIFIED, embedding_records, 48),
    "pretrain": (PRETRAINING, plain_texts, 48),
}


@dataclass(frozen=True)
class Case:
    """name: row of the table. spoils: what is done to the newest checkpoint before the resume. says: a part of the
    log that must be there. code: of the run without a launcher; None for any but 0."""

    name: str
    processes: int
    fault: Fault
    spoils: str | None = None
    says: str = ""
    code: int | None = None


@dataclass
class Row:
    times: int = 0
    ended_right: int = 0
    resumed: int = 0
    equal: int = 0
    slowest: float = 0.0


def main() -> int:
    arguments = parse()
    numbers = random.Random(arguments.seed)
    cases = list(quick_cases() if arguments.quick else all_cases(numbers))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["RAG_RETRIEVAL_CACHE"] = f"{folder}/cache"
        rows = run_cases(cases, Path(folder), arguments.task, arguments.within)
    print_table(rows)
    return int(any({row.ended_right, row.resumed, row.equal} != {row.times} for row in rows.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="reranker", help="what is trained")
    parser.add_argument("--quick", action="store_true", help="one fault of each kind that needs no luck")
    parser.add_argument("--within", type=float, default=60, help="seconds in which a run with a fault must end")
    parser.add_argument("--folder", help="where to work; default the system's folder for temporary files")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    return parser.parse_args()


# --- the faults ---


def quick_cases() -> Iterator[Case]:
    yield Case("SIGKILL while saving", 1, Fault("kill one", "saving", 3, 0.005))
    yield Case("SIGTERM to one process", 2, Fault("SIGTERM to one", call=7, ranks=(1,)), says="stopped by SIGTERM")
    yield Case("bit flipped in the newest checkpoint", 1, Fault("kill one", call=11), spoils="flip")
    yield Case("exception on one process", 2, Fault("exception", call=9, ranks=(1,)), says="error in process 1")
    yield Case("NaN in a batch", 1, Fault("NaN in a batch", call=5), says="the loss of step")
    yield Case("output folder gone", 1, Fault("folder gone", "step", 8), says="the folder is gone")


def all_cases(numbers: random.Random) -> Iterator[Case]:
    yield from kills(numbers)
    for processes in (1, 2):
        last = processes - 1
        at = Fault("SIGTERM to one", call=numbers.randint(2, STEPS - 3), ranks=(last,))
        code = 143 if processes == 1 else None
        yield Case("SIGTERM to one process", processes, at, says="stopped by SIGTERM after step", code=code)
        at = Fault("SIGINT to one", "evaluation", 2, ranks=(last,))
        code = 130 if processes == 1 else None
        yield Case("SIGINT to one process, in evaluation", processes, at, says="stopped by SIGINT", code=code)
        full = Fault("full disk", "saving", 3)
        yield Case("disk full while saving", processes, full, says="no space left to write")
        gone = Fault("folder gone", "step", 8)
        yield Case("output folder gone", processes, gone, says="the folder is gone")
        for spoils in ("truncate", "flip", "unlink"):
            name = {"truncate": "file truncated", "flip": "bit flipped", "unlink": "file missing"}[spoils]
            yield Case(f"{name} in the newest checkpoint", processes, Fault("kill all", call=13), spoils=spoils)
        loader = Fault("kill a data loader", call=5, ranks=(last,))
        yield Case("data loading process killed", processes, loader, says="a data loading process ended")
        nan = Fault("NaN in a batch", call=10, ranks=(last,))
        yield Case("NaN in a batch", processes, nan, says="the loss of step")
        wrong = Fault("exception", call=10, ranks=(last,))
        yield Case("exception on one process", processes, wrong, says=f"error in process {last}:\nTraceback")
    launcher = Fault("SIGTERM to the launcher", call=9)
    yield Case("SIGTERM to the launcher", 2, launcher, says="stopped by SIGTERM after step")
    yield Case("one process slower", 2, Fault("slow", ranks=(1,)), code=0)


def kills(numbers: random.Random) -> Iterator[Case]:
    """SIGKILL at random moments of each phase, of a process alone and of one or both of two."""
    # seconds of the phase, about
    longest = {"step": 0.03, "saving": 0.06, "rotation": 0.004, "evaluation": 0.03, "the end": 0.02}
    calls = {"step": STEPS, "saving": 8, "rotation": 8, "evaluation": 6, "the end": 1}
    victims = [(1, "kill one", (0,))] + [(2, "kill one", (rank,)) for rank in (0, 1)] + [(2, "kill all", (0,))]
    for phase, most in longest.items():
        for processes, do, ranks in victims:
            if phase in ("rotation", "the end") and ranks == (1,):
                continue
            times = {1: 4, 2: 3 if do == "kill all" else 2}[processes] - (phase in ("evaluation", "the end"))
            for _ in range(times):
                call, delay = numbers.randint(1, calls[phase]), numbers.uniform(0, most)
                who = "all" if do == "kill all" or processes == 1 else f"process {ranks[0]}"
                yield Case(f"SIGKILL of {who}, {phase}", processes, Fault(do, phase, call, delay, ranks))


def spoil(run: Path, how: str) -> None:
    """Damage the largest file of the newest checkpoint."""
    newest = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "unlink":
        file.unlink()
        return
    content = bytearray(file.read_bytes())
    if how == "truncate":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 16
    file.write_bytes(content)


# --- the runs ---


def run_cases(cases: list[Case], folder: Path, task: str, within: float) -> dict[tuple[str, int], Row]:
    undisturbed = {}
    for processes in sorted({case.processes for case in cases}):
        config = configure(folder, f"whole-{processes}", processes, task)
        outcome = start(processes, config, folder / "whole.log")
        assert outcome.code == 0, outcome.log
        undisturbed[processes] = weights(folder / f"whole-{processes}")
    rows: dict[tuple[str, int], Row] = {}
    for number, case in enumerate(cases):
        row = rows.setdefault((case.name, case.processes), Row())
        config = configure(folder, f"run-{number}", case.processes, task)
        run_case(case, config, undisturbed[case.processes], row, within)
        print(f"{number + 1}/{len(cases)} {case.name}, {case.processes}: {row}", file=sys.stderr, flush=True)
    return rows


def run_case(case: Case, config: Path, expected: dict[str, torch.Tensor], row: Row, within: float) -> None:
    run = config.with_suffix("")
    hurt = start(case.processes, config, config.with_suffix(".log"), fault=case.fault)
    row.times += 1
    row.slowest = max(row.slowest, hurt.seconds)
    row.ended_right += ended_as_expected(case, hurt, within)
    gone = run.with_name(run.name + "-gone")
    if gone.exists():
        gone.rename(run)
    if case.spoils:
        spoil(run, case.spoils)
    if hurt.code != 0:
        again = start(case.processes, config, config.with_suffix(".resumed.log"), "--resume", "auto")
        passed_over = not case.spoils or "damaged checkpoint passed over" in again.log
        row.resumed += again.code == 0 and passed_over
        if again.code:
            print(hurt.log, again.log, sep="\n", file=sys.stderr)
    else:
        row.resumed += 1
    final = weights(run)
    row.equal += final.keys() == expected.keys() and all(torch.equal(final[key], expected[key]) for key in final)


def ended_as_expected(case: Case, outcome: Outcome, within: float) -> bool:
    """Whether the run ended within so many seconds, and as the case says."""
    right_code = outcome.code != 0 if case.code is None else outcome.code == case.code
    right = right_code and case.says in outcome.log and not outcome.hung and outcome.seconds < within
    if not right:
        print(f"{case}: code {outcome.code}, {outcome.seconds:.0f} s\n{outcome.log}", file=sys.stderr)
    return right


def configure(folder: Path, name: str, processes: int, task: str) -> Path:
    """The configuration file of a run in `folder/name`; model and data are made at the first call."""
    keys, records, training_records = TASKS[task]
    if not (folder / "bert").exists():
        tiny_bert(folder / "bert")
        write_jsonl(folder / "train.jsonl", records(training_records))
        write_jsonl(folder / "val.jsonl", records(9, seed=3))
    values = keys | {
        "model_name_or_path": str(folder / "bert"),
        "train_dataset": str(folder / "train.jsonl"),
        "val_dataset": str(folder / "val.jsonl"),
        "output_dir": str(folder / name),
        "epochs": EPOCHS,
        "batch_size": RECORDS_PER_STEP // 2 // processes,
        "gradient_accumulation_steps": 2,
        "lr": 1e-3,
        "num_workers": 1,
        "save_steps": 3,
        "eval_steps": 4,
        "num_max_checkpoints": 2,
        "log_interval": 1,
    }
    return Path(write_yaml(folder / f"{name}.yaml", values))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the final model and its heads; {} where there is none."""
    return all_weights(run) if (run / "model" / "model.safetensors").exists() else {}


def print_table(rows: dict[tuple[str, int], Row]) -> None:
    print("| fault | processes | times | ended as it should | resumed | weights equal | slowest end, s |")
    print("|---|---|---|---|---|---|---|")
    for (name, processes), row in rows.items():
        cells = (name, processes, row.times, row.ended_right, row.resumed, row.equal, f"{row.slowest:.1f}")
        print(f"| {' | '.join(map(str, cells))} |")
    total, equal = (sum(getattr(row, part) for row in rows.values()) for part in ("times", "equal"))
    print(f"\n{total} faults, {equal} of them ended with the weights of the run without them")


if __name__ == "__main__":
    sys.exit(main())
