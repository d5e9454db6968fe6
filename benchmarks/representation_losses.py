"""Losses over lexical weights and token vectors, beside those of other libraries, on one CPU thread.

    python benchmarks/representation_losses.py memory   # lexical weights: FlagEmbedding's tensors and ours
    python benchmarks/representation_losses.py speed    # MaxSim: PyLate's, sentence-transformers' and ours

All sides have the same inputs, and are first held to the same loss and gradients. FlagEmbedding and PyLate pin other
versions of libraries: install them with `pip install --no-deps --target DIR` and put DIR on PYTHONPATH. A side that
cannot be imported is left out with a line that says so.

memory: the head, the scores and the loss, forward and backward, over given states of a batch in float32: no backbone,
which is the same on both sides. The peak is that of a process of its own (VmHWM, Linux), above its memory before. The
other side's grows with texts times tokens times vocabulary: it is measured at two numbers of texts that fit, and the
line through both gives its peak at `--texts`.

speed: scores of all queries with all documents, the contrastive loss, and gradients at the token vectors. CPU seconds;
rounds take turns. Padding of the other sides' vectors is not timed, and their masks are given.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rag_retrieval.data.step_records import StepRecords
from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.step_gradients import representation_gradients
from rag_retrieval.losses.step_outputs import StepOutputs
from rag_retrieval.losses.step_targets import StepTargets, targets_of
from rag_retrieval.losses.unified import unified
from rag_retrieval.models.lexical import linear_weights
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import make_batch

MIB = 1 << 20
TEMPERATURE = {"lexical": 0.02, "multi_vector": 1.0}
SPECIAL = np.arange(4)  # ids that have no weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["memory", "speed"])
    parser.add_argument("--texts", type=int, default=32, help="memory: documents of the batch")
    parser.add_argument("--fitting", type=int, nargs=2, default=[1, 2], help="memory: documents for the other side")
    parser.add_argument("--tokens", type=int, default=512, help="memory: tokens of a document")
    parser.add_argument("--vocabulary", type=int, default=250_000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=32, help="speed: with 8 documents each")
    parser.add_argument("--width", type=int, default=128, help="speed: of a token vector")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, one thread, float32")
    report = {"memory": report_memory, "speed": report_speed}[arguments.what]
    report(arguments)


def step_of(queries: int, documents: int) -> StepTargets:
    """Document i is the positive of query i, all others are negatives."""
    ids = np.arange(documents, dtype=np.uint64)
    none, offsets = np.zeros(0, np.uint64), np.zeros(queries + 1, np.int64)
    return targets_of(ids[:queries], ids, [StepRecords(ids[:queries], ids[:queries], none, offsets, none, offsets)])


def ours(name: str, queries: StepOutputs, documents: StepOutputs, targets: StepTargets) -> tuple[float, Tensor, Tensor]:
    """Mean loss, and its gradients at queries and documents."""
    objective = unified(objective_of({"info_nce": 1.0}, {"temperature": TEMPERATURE[name]}), [name])
    found = representation_gradients(objective, queries, documents, targets, 1 / len(targets.queries))
    return found.losses.mean().item(), getattr(found.queries, name), getattr(found.documents, name)


# ---- memory of lexical weights -----------------------------------------------------------------------------


def report_memory(arguments: argparse.Namespace) -> None:
    sizes = arguments.tokens, arguments.vocabulary, arguments.hidden
    print(f"{arguments.texts} documents of {arguments.tokens} tokens, vocabulary {arguments.vocabulary:,}")
    own = in_a_process(our_weights, arguments.texts, *sizes)
    print(f"rag_retrieval  {own[0]:>10,.0f} MiB")
    first, second = arguments.fitting
    try:
        measured = [in_a_process(their_weights, texts, *sizes) for texts in (first, second)]
    except ImportError as error:
        print(f"FlagEmbedding is left out: {error}")
        return
    for texts, (_, loss, gradient) in zip((first, second), measured, strict=True):
        _, own_loss, own_gradient = in_a_process(our_weights, texts, *sizes)
        np.testing.assert_allclose(own_loss, loss, rtol=1e-4)
        np.testing.assert_allclose(own_gradient, gradient, rtol=1e-3, atol=1e-4 * abs(gradient).max())
    slope = (measured[1][0] - measured[0][0]) / (second - first)
    theirs = measured[0][0] + slope * (arguments.texts - first)
    print(f"FlagEmbedding  {theirs:>10,.0f} MiB, from", end=" ")
    print(", ".join(f"{peak:,.0f} at {texts}" for texts, (peak, *_) in zip((first, second), measured, strict=True)))
    one = arguments.texts * arguments.tokens * arguments.vocabulary * 4 / MIB
    print(f"one tensor of texts x tokens x vocabulary: {one:,.0f} MiB; FlagEmbedding / ours: {theirs / own[0]:,.0f}")


def in_a_process(side: Callable, *arguments: int) -> tuple[float, float, np.ndarray]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_of, (side, *arguments))


def peak_of(side: Callable, texts: int, tokens: int, vocabulary: int, hidden: int) -> tuple[float, float, np.ndarray]:
    """MiB above the memory before, the loss, and the head's gradient."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden, 1)
    head.load_state_dict({"weight": torch.randn(1, hidden, generator=generator), "bias": torch.zeros(1)})
    counts, lengths = (max(1, texts // 8), texts), (32, tokens)
    shapes = zip(counts, lengths, strict=True)
    ids = [torch.randint(len(SPECIAL), vocabulary, shape, generator=generator) for shape in shapes]
    ids[1][: counts[0], :32] = ids[0]  # a query's words are in its positive
    states = [torch.randn(*each.shape, hidden, generator=generator).requires_grad_() for each in ids]
    run = side(head, ids, states, vocabulary)
    before = memory("VmRSS")
    loss = run()
    return memory("VmHWM") - before, loss, head.weight.grad.numpy()


def memory(key: str) -> float:
    """MiB of this process: VmRSS as it is, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def our_weights(head: nn.Linear, ids: list[Tensor], states: list[Tensor], vocabulary: int) -> Callable[[], float]:
    batches = [make_batch([EncodedPair(row.astype(np.int32), None, False, 0) for row in each.numpy()]) for each in ids]
    targets = step_of(len(ids[0]), len(ids[1]))

    def run() -> float:
        found = [
            linear_weights(head(each.flatten(0, 1)).relu().squeeze(1), batch, SPECIAL)
            for each, batch in zip(states, batches, strict=True)
        ]
        outputs = (StepOutputs(lexical=(each.ids, each.weights.detach(), each.counts)) for each in found)
        loss, *gradients = ours("lexical", *outputs, targets)
        sum((each.weights * gradient).sum() for each, gradient in zip(found, gradients, strict=True)).backward()
        return loss

    return run


def their_weights(head: nn.Linear, ids: list[Tensor], states: list[Tensor], vocabulary: int) -> Callable[[], float]:
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model as Model

    names = ("cls_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    tokenizer = SimpleNamespace(**dict(zip(names, SPECIAL.tolist(), strict=True)))
    model = SimpleNamespace(sparse_linear=head, training=True, vocab_size=vocabulary, tokenizer=tokenizer)
    model.temperature = TEMPERATURE["lexical"]
    model._compute_similarity = lambda queries, documents: Model._compute_similarity(model, queries, documents)

    def run() -> float:
        queries, documents = (
            Model._sparse_embedding(model, state, each) for state, each in zip(states, ids, strict=True)
        )
        scores = Model.compute_sparse_score(model, queries, documents)
        loss = F.cross_entropy(scores, torch.arange(len(scores)))
        loss.backward()
        return loss.item()

    return run


# ---- speed of MaxSim ---------------------------------------------------------------------------------------


def report_speed(arguments: argparse.Namespace) -> None:
    """Documents have 30 to 256 vectors, of a log-normal distribution as passages of text have; queries have 32."""
    numbers = np.random.default_rng(0)
    lengths = numbers.lognormal(5.0, 0.5, 8 * arguments.queries).clip(30, 256).astype(int)
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: F.normalize(torch.randn(count, arguments.width, generator=generator), dim=1)  # noqa: E731
    documents = [draw(length) for length in lengths.tolist()]
    # a query's vectors are near vectors of its positive, so that the loss is neither 0 nor chance
    queries = [F.normalize(documents[i][:30].repeat(2, 1)[:32] + 2 * draw(32), dim=1) for i in range(arguments.queries)]
    print(f"{len(queries)} queries of 32 vectors, {len(documents)} documents of {lengths.min()} to {lengths.max()}, "
          f"{lengths.mean():.0f} on average, of width {arguments.width}")  # fmt: skip
    sides = {"rag_retrieval": our_maxsim(queries, documents)}
    for name, find in (("PyLate", pylate_scores), ("sentence-transformers", sentence_transformers_scores)):
        try:
            sides[name] = padded_maxsim(find(), queries, documents)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    wanted = sides["rag_retrieval"]()
    for name, run in sides.items():
        for mine, other in zip(wanted, run(), strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    own = seconds["rag_retrieval"]
    for name, values in seconds.items():
        ratios = [value / mine for value, mine in zip(values, own, strict=True)]
        print(f"{name:<22} {statistics.median(values):7.3f} s  {statistics.median(ratios):5.2f}  "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


def our_maxsim(queries: list[Tensor], documents: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    targets = step_of(len(queries), len(documents))
    outputs = [
        StepOutputs(multi_vector=(torch.cat(each), torch.tensor([len(text) for text in each])))
        for each in (queries, documents)
    ]

    def run() -> tuple[Tensor, ...]:
        loss, *gradients = ours("multi_vector", *outputs, targets)
        return torch.tensor(loss), *gradients

    return run


def padded_maxsim(
    score: Callable[..., Tensor], queries: list[Tensor], documents: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """score: of vectors [texts, tokens, width] of queries and documents, and masks, to [queries, documents]."""
    sides = [pad_sequence(each, batch_first=True) for each in (queries, documents)]
    masks = [pad_sequence([torch.ones(len(text)) for text in each], batch_first=True) for each in (queries, documents)]

    def run() -> tuple[Tensor, ...]:
        leaves = [side.detach().requires_grad_() for side in sides]
        loss = F.cross_entropy(score(*leaves, *masks) / TEMPERATURE["multi_vector"], torch.arange(len(queries)))
        loss.backward()
        return loss.detach(), *(leaf.grad[mask > 0] for leaf, mask in zip(leaves, masks, strict=True))

    return run


def pylate_scores() -> Callable[..., Tensor]:
    from pylate.scores import colbert_scores

    return colbert_scores


def sentence_transformers_scores() -> Callable[..., Tensor]:
    from sentence_transformers.util import maxsim

    return maxsim


if __name__ == "__main__":
    main()
