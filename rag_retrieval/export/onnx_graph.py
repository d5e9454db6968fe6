"""The ONNX graph of a model: padded token ids in, scores of pairs or representations of texts out.

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

from rag_retrieval.infer.onnx_folder import PROMPT_TOKENS, SCORES, SENTENCE_EMBEDDING, output_names
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.kept_tokens import is_cls_copy
from rag_retrieval.models.lexical import output_states
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.pooling import unscaled_weights
from rag_retrieval.models.representation_files import SPLADE
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.transformer import TransformerModule

OPSET = 20  # the first with Gelu as one node
TRACED = (3, 17)  # texts, tokens: numbers that no dimension of a model has
EXTERNAL_FROM = 1_500_000_000  # bytes of weights; a file of ONNX itself ends at 2 GiB


class Graph(nn.Module):
    """What is traced. Its forward takes the inputs of the ONNX graph in their order and gives `outputs`.

    texts: what the first axis is called. outputs: names.
    """

    texts: str
    outputs: tuple[str, ...]

    def __init__(self, model: TransformerModule, body: nn.Module):
        """body: the module of Hugging Face that gets the inputs."""
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        self.takes_mask = not model.causal  # padding is at the right, which no token of a causal model attends to

    def model_inputs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the Hugging Face model. Each of the two is [texts, longest], int64."""
        inputs = {"input_ids": input_ids}
        if self.takes_mask:
            inputs["attention_mask"] = attention_mask
        if self.takes_positions:
            inputs["position_ids"] = self.positions(input_ids)
        return inputs

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As `Packing` numbers them: RoBERTa's family gives its padding token no number, also inside a text."""
        padding = self.model.first_position - 1
        if padding < 0:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        real = (input_ids != padding).long()
        return real.cumsum(dim=1) * real + padding


class ScoreGraph(Graph):
    """`PairScorer.scores_of`, with positions."""

    texts, outputs = "pairs", (SCORES,)

    def __init__(self, scorer: PairScorer):
        hugging_face = scorer.model
        causal_body = getattr(hugging_face, hugging_face.base_model_prefix, hugging_face)
        super().__init__(scorer, causal_body if scorer.causal else hugging_face)

    def forward(self, input_ids, attention_mask, token_type_ids=None) -> torch.Tensor:
        """Each [pairs, longest], int64. Returns [pairs], float32."""
        inputs = self.model_inputs(input_ids, attention_mask)
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        return self.model.scores_of(inputs, attention_mask.sum(dim=1))


class EmbedderGraph(Graph):
    """`EmbeddingModel.forward` of a padded batch: of all texts' tokens what the heads give, and of a text what does not
    depend on which tokens are kept. A dense vector is there twice, the second time of length 1 where the model
    normalizes."""

    texts = "texts"

    def __init__(self, embedder: EmbeddingModel):
        super().__init__(embedder, embedder.model.base_model)
        settings = embedder.settings
        self.takes_mask |= settings.query_expansion and not settings.attend_to_expansion_tokens
        self.outputs = tuple(output_names(settings).values())
        if DENSE in settings.representations:
            self.outputs += (SENTENCE_EMBEDDING,)

    def forward(self, input_ids, attention_mask, prompt_tokens=None) -> tuple[torch.Tensor, ...]:
        """The first two [texts, longest], prompt_tokens [texts], int64. Returns `outputs`, float32, whose shapes are in
        `infer.onnx_folder`."""
        embedder, names = self.model, self.model.settings.representations
        inputs = self.model_inputs(input_ids, attention_mask)
        if embedder.text_encoder.template.has_types:
            inputs["token_type_ids"] = torch.zeros_like(input_ids)
        states, found = embedder.states_of(inputs), {}
        if DENSE in names:
            found[DENSE] = embedder.project(self.pooled(states, attention_mask, prompt_tokens))
        if LEXICAL in names:
            is_splade = embedder.settings.lexical == SPLADE
            found[LEXICAL] = self.splade(states, attention_mask) if is_splade else embedder.lexical_of_tokens(states)
        if MULTI_VECTOR in names:
            found[MULTI_VECTOR] = nn.functional.normalize(embedder.token_heads[MULTI_VECTOR](states), dim=-1)
        outputs = [found[name] for name in names]
        if DENSE in names:
            vectors = found[DENSE]
            outputs.append(nn.functional.normalize(vectors) if embedder.settings.normalize else vectors.clone())
        return tuple(outputs)

    def pooled(
        self, states: torch.Tensor, attention_mask: torch.Tensor, prompt_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """[texts, hidden], float32."""
        embedder, settings, lengths = self.model, self.model.settings, attention_mask.sum(dim=1)
        if settings.pooling == "cls" and settings.reads_one_token:
            return states[:, 0].float()
        if settings.reads_one_token:
            return states[torch.arange(len(lengths)), lengths - 1].float()
        weights = self.weights(attention_mask, lengths, prompt_tokens)
        return (embedder.attend_to_latents(states).float() * weights[..., None]).sum(dim=1)

    def splade(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`models.lexical.splade_weights` as a row for each text: [texts, vocabulary]."""
        embedder, counted = self.model, attention_mask > 0
        if embedder.settings.cls_interval is not None:
            places, suffix = torch.arange(states.shape[1])[None], len(embedder.text_encoder.template.suffix)
            lengths = attention_mask.sum(dim=1, keepdim=True)
            counted = counted & ~is_cls_copy(places, lengths, embedder.settings.cls_interval, suffix)
        # a text's first token in place of those that do not count, which changes no largest logit
        states = torch.where(counted[..., None], states, states[:, :1])
        logits = embedder.model.get_output_embeddings()(output_states(embedder.model, states))
        return logits.amax(dim=1).float().relu().log1p()

    def weights(self, mask: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """`token_weights` of a padded batch: [texts, longest], float32."""
        places = torch.arange(mask.shape[1], device=mask.device)[None]
        starts = None if starts is None else starts[:, None]
        settings, suffix = self.model.settings, len(self.model.text_encoder.template.suffix)
        arguments = (settings.pooling, places, lengths[:, None], starts, settings.cls_interval, suffix)
        weights = (unscaled_weights(*arguments) * mask).float()
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0)


def write_graph(graph: Graph, inputs: tuple[str, ...], file: Path) -> None:
    """Trace the graph and write `file`, with the weights in `file`.data where they are too many for one file.

    inputs: their names, in order. The model's attention is changed for good: it can only be thrown away. Raises
    ValueError where the family's code cannot be traced.
    """
    model = graph.model
    model.model.set_attn_implementation("eager")  # half as many nodes as sdpa, and as fast
    examples, shapes = example_inputs(inputs, len(model.tokenizer), graph.texts)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    with evaluating(graph), quiet():
        try:
            torch.onnx.export(
                graph,
                examples,
                file,
                input_names=list(inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                external_data=size >= EXTERNAL_FROM,
                verbose=False,
            )
        except OSError:  # of writing the file
            raise
        except Exception as error:  # whatever a family's own code raises when it is traced
            reason = " ".join(str(error).split())
            raise ValueError(
                f"a {model.config.model_type} cannot be written as ONNX with the installed torch "
                f"({type(error).__name__}: {reason:.300})"
            ) from error


def example_inputs(names: tuple[str, ...], vocabulary: int, texts: str) -> tuple[tuple[torch.Tensor, ...], tuple]:
    """What is traced, and the free axes of each."""
    ids = torch.arange(TRACED[0] * TRACED[1]).view(TRACED) % vocabulary
    mask = (torch.arange(TRACED[1]) < torch.tensor([[17], [9], [4]])).long()
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    known[PROMPT_TOKENS] = torch.tensor([2, 1, 0])
    axes = {0: texts, 1: "length"}
    return tuple(known[name] for name in names), tuple({0: texts} if name == PROMPT_TOKENS else axes for name in names)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that torch's exporter logs and warns of, which no user of ours can act on."""
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


def last_products(model: onnx.ModelProto, *outputs: str) -> list[str]:
    """Names of the products that give these outputs: of those before one, the last on each way."""
    makers = {output: node for node in model.graph.node for output in node.output}
    found, seen, waiting = [], set(), [*outputs]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in ("MatMul", "Gemm"):
            found.append(node.name)
        else:
            waiting.extend(node.input)
    return found
