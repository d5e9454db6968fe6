"""What each process of tests/models/test_process_scoring.py does; spawned processes import it by this name."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pair_samples import some_pairs

from rag_retrieval import CrossEncoder
from rag_retrieval.models import process_scoring, scoring
from rag_retrieval.models.process_scoring import score_over_processes


def run(rank: int, world: int, model: str, folder: str) -> None:
    """Join a gloo group of `world` processes, score, and write what came to `folder/RANK.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", timedelta(seconds=600), world_size=world, rank=rank)
    scorer, pairs, found = CrossEncoder.from_pretrained(model), some_pairs(60), {}
    found["one chunk"] = score_over_processes(scorer, pairs)
    scoring.CHUNK_TEXTS = process_scoring.CHUNK_TEXTS = 25
    forwards = []
    hook = scorer.register_forward_pre_hook(lambda module, arguments: forwards.append(len(arguments[0])))
    found["chunks"] = score_over_processes(scorer, pairs, batch_size=7, max_length=40, normalize=True)
    hook.remove()
    found["forwards"] = forwards
    found["one pair"] = score_over_processes(scorer, pairs[0])
    found["none"] = score_over_processes(scorer, [])
    lists = {
        "lengths": pairs[: 9 + rank],
        "texts": [*pairs, ("q", f"document of {rank}")],
        "one bad": [*pairs, ("q", 7 if rank else "d")],
    }
    for name, own in lists.items():
        found[name] = error_of(lambda own=own: score_over_processes(scorer, own))
    found["options"] = error_of(lambda: score_over_processes(scorer, pairs, batch_size=5 + rank))
    if rank == 0:  # which plans for all
        plan, process_scoring.plan_forwards = process_scoring.plan_forwards, fail
    found["planning"] = error_of(lambda: score_over_processes(scorer, pairs))
    if rank == 0:
        process_scoring.plan_forwards = plan
    repeated = [pair for pair in pairs[:20] for _ in range(2)]
    found["repeated"] = score_over_processes(scorer, repeated)
    if rank:
        scorer.register_forward_pre_hook(fail)
    found["failure"] = error_of(lambda: score_over_processes(scorer, pairs))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def fail(*arguments):
    raise RuntimeError("this process fails")


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
