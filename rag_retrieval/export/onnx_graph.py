"""The ONNX graph of a reranker: padded token ids in, one score for each pair out.

Positions are given to the model, as the packed forward numbers them.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from rag_retrieval.infer.onnx_folder import INPUTS, RerankerDescription
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.scoring import evaluating

OPSET = 18
TRACED = (3, 17)  # pairs, tokens: numbers that no dimension of a model has
EXTERNAL_FROM = 1_500_000_000  # bytes of weights; a file of ONNX itself ends at 2 GiB


class ScoreGraph(nn.Module):
    """What is traced: `PairScorer.scores_of` with positions, from the inputs of the ONNX graph, in their order."""

    def __init__(self, scorer: PairScorer):
        super().__init__()
        self.scorer = scorer
        body = scorer.model if not scorer.causal else getattr(scorer.model, scorer.model.base_model_prefix)
        self.takes_positions = "position_ids" in inspect.signature(body.forward).parameters

    def forward(self, input_ids, attention_mask, token_type_ids=None) -> torch.Tensor:
        """Each [pairs, longest], int64. Returns [pairs], float32."""
        inputs = {"input_ids": input_ids}
        if not self.scorer.causal:  # padding is at the right, which no token of a causal model attends to
            inputs["attention_mask"] = attention_mask
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.takes_positions:
            inputs["position_ids"] = self.positions(input_ids)
        return self.scorer.scores_of(inputs, attention_mask.sum(dim=1))

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As `Packing` numbers them: RoBERTa's family gives its padding token no number, also inside a text."""
        padding = self.scorer.first_position - 1
        if padding < 0:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        real = (input_ids != padding).long()
        return real.cumsum(dim=1) * real + padding


def input_names(scorer: PairScorer) -> tuple[str, ...]:
    return INPUTS if scorer.pair_encoder.template.types is not None else INPUTS[:2]


def write_graph(scorer: PairScorer, file: Path) -> None:
    """Trace the scorer and write `file`, with the weights in `file`.data where they are too many for one file.

    The scorer's attention is changed for good: it can only be thrown away. Raises ValueError where the family's code
    cannot be traced.
    """
    scorer.model.set_attn_implementation("eager")  # half as many nodes as sdpa, and as fast
    names = input_names(scorer)
    ids = torch.arange(TRACED[0] * TRACED[1]).view(TRACED) % len(scorer.tokenizer)
    mask = (torch.arange(TRACED[1]) < torch.tensor([[17], [9], [4]])).long()
    inputs = (ids, mask, torch.zeros_like(ids))[: len(names)]
    dynamic = {0: "pairs", 1: "length"}
    size = sum(value.numel() * value.element_size() for value in scorer.model.state_dict().values())
    with evaluating(scorer), quiet():
        try:
            torch.onnx.export(
                ScoreGraph(scorer),
                inputs,
                file,
                input_names=list(names),
                output_names=[RerankerDescription.output],
                dynamic_shapes=tuple(dynamic for _ in names),
                opset_version=OPSET,
                dynamo=True,
                external_data=size >= EXTERNAL_FROM,
                verbose=False,
            )
        except Exception as error:  # whatever a family's own code raises when it is traced
            reason = " ".join(str(error).split())
            raise ValueError(
                f"a {scorer.config.model_type} cannot be written as ONNX with the installed torch "
                f"({type(error).__name__}: {reason:.300})"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that exporter and quantizer log and warn of, which no user of ours can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def beside(file: Path) -> Path:
    """Where the weights of a graph stand that do not fit into its own file."""
    return file.with_name(f"{file.name}.data")


def score_head(model: onnx.ModelProto) -> list[str]:
    """Names of the products that give the scores: of those before the output, the last on each way."""
    makers = {output: node for node in model.graph.node for output in node.output}
    heads, seen, waiting = [], set(), [RerankerDescription.output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in ("MatMul", "Gemm"):
            heads.append(node.name)
        else:
            waiting.extend(node.input)
    return heads
