"""What a cross-encoder and an LLM decoder have in common: a batch of pairs in, one score per pair out.

The score is the raw logit, never a probability: apply torch.sigmoid where a probability is meant, and know
that only a pointwise loss teaches one.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rag_retrieval.models.model_files import RerankerSettings, write_settings
from rag_retrieval.models.model_loading import check_max_length
from rag_retrieval.models.pair_batch import PairBatch, make_batch
from rag_retrieval.models.pair_encoding import PairEncoder

SCORING_CHUNK = 8192  # pairs tokenized and sorted together; bounds memory on endless lists


class PairScorer(nn.Module):
    """A Hugging Face sequence-classification model with one label, and the encoder of its pairs.

    `model` is the Hugging Face model, `pair_encoder` turns texts into ids, `settings` is what is saved beside
    the weights, `new_parameters` names the parameters that no checkpoint gave (a fresh head).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pair_encoder: PairEncoder,
        settings: RerankerSettings,
        new_parameters: set[str],
    ):
        super().__init__()
        self.model = model
        self.pair_encoder = pair_encoder
        self.settings = settings
        self.new_parameters = new_parameters
        # a new module starts in train mode, but from_pretrained leaves the Hugging Face model in eval mode
        self.training = model.training
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 1:
                module.register_forward_hook(score_in_float32)

    @property
    def tokenizer(self):
        return self.pair_encoder.tokenizer

    @property
    def config(self):
        """The Hugging Face configuration: engines read hidden sizes from it."""
        return self.model.config

    @property
    def _no_split_modules(self):
        """The layer classes that FSDP wraps one by one, as the family names them."""
        return self.model._no_split_modules

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: PairBatch) -> torch.Tensor:
        """Scores (logits) of the pairs: [pairs], float32, on the model's device."""
        raise NotImplementedError

    def compute_score(
        self,
        pairs: Sequence[Sequence[str]] | Sequence[str],
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        show_progress_bar: bool | None = None,
    ) -> torch.Tensor:
        """Scores of (query, document) pairs: [pairs], float32, on the CPU, in the order given.

        pairs: a list of [query, document], or one such pair. An empty list gives an empty tensor.
        batch_size: pairs per forward pass. max_length: tokens per pair; None means the model's own.
        normalize: the sigmoid of the score, in [0, 1]. After RankNet or listwise training only the order of
        scores was taught, and this is no probability.
        show_progress_bar: None shows one on a terminal when there are more than ten batches.
        Work is sorted by token length and runs in eval mode without gradients, under bf16 (or fp16) autocast
        on CUDA; the mode the model was in is restored. Raises ValueError naming the position of a bad pair.
        """
        pairs = check_pairs(pairs)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        encoder = self.pair_encoder
        if max_length is not None and max_length != encoder.max_length:
            check_max_length(max_length, self.model)
            encoder = PairEncoder(encoder.tokenizer, encoder.template, max_length)
        if show_progress_bar is None:
            show_progress_bar = len(pairs) > 10 * batch_size and sys.stderr.isatty()
        scores = torch.empty(len(pairs), dtype=torch.float32)
        with scoring_mode(self), tqdm(total=len(pairs), unit="pair", disable=not show_progress_bar) as bar:
            for start in range(0, len(pairs), SCORING_CHUNK):
                encoded = encoder.encode(pairs[start : start + SCORING_CHUNK])
                for positions in batches_by_length([len(pair) for pair in encoded], batch_size):
                    batch = make_batch([encoded[position] for position in positions]).to(self.device)
                    scores[start + torch.tensor(positions)] = self(batch).float().cpu()
                    bar.update(len(positions))
        return scores.sigmoid() if normalize else scores

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder (safetensors, config, tokenizer) plus `reranker_config.json`.

        state_dict: weights of the Hugging Face model, where an engine has gathered them; default its own.
        """
        folder = Path(folder)
        # Without this, sentence-transformers would apply a sigmoid that saturates after listwise training
        self.model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.tokenizer.save_pretrained(folder)
        write_settings(folder, self.settings)


def score_in_float32(layer: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Forward hook of the layer that gives the score: the same product in float32, where autocast took half.

    In bfloat16 scores between 4 and 8 would come in steps of 1/32: documents of a query would tie.
    """
    if output.dtype == torch.float32:
        return output
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(output.device.type, enabled=False):
        return nn.functional.linear(inputs[0].float(), layer.weight.float(), bias)


def check_pairs(pairs) -> list[tuple[str, str]]:
    """The pairs as a list of tuples; a single [query, document] becomes a list of one."""
    if isinstance(pairs, (str, bytes, Mapping, Set)) or not isinstance(pairs, Iterable):
        raise ValueError(f"pairs must be a list of [query, document], found {type(pairs).__name__}")
    pairs = list(pairs)
    if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
        pairs = [pairs]
    return [check_pair(position, pair) for position, pair in enumerate(pairs)]


def check_pair(position: int, pair) -> tuple[str, str]:
    if isinstance(pair, (str, bytes)) or not isinstance(pair, (Sequence, np.ndarray)) or len(pair) != 2:
        raise ValueError(f"pairs[{position}] must be [query, document], found {pair!r:.100}")
    for name, text in zip(("query", "document"), pair, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"pairs[{position}]: the {name} must be a string, found {type(text).__name__}")
        if not is_unicode(text):
            raise ValueError(
                f"pairs[{position}]: the {name} holds half a surrogate pair, which is no text: {text!a:.100}"
            )
    return pair[0], pair[1]


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, as a broken JSON escape gives: tokenizers cannot read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def batches_by_length(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Positions in batches of similar length, longest first so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def scoring_mode(scorer: PairScorer):
    """Eval mode, no gradients and, for float32 weights on CUDA, half-precision autocast.

    Each module gets its own mode back, since parts of a model may be in eval mode while it trains.
    """
    modes = [(module, module.training) for module in scorer.modules()]
    scorer.eval()
    autocast = nullcontext()
    if scorer.device.type == "cuda" and scorer.model.dtype == torch.float32:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        autocast = torch.autocast("cuda", dtype=dtype)
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module, training in modes:
            module.training = training
