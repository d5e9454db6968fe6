"""What a cross-encoder and an LLM decoder have in common: a batch of pairs in, one score per pair out.

The score is the raw logit, never a probability: apply torch.sigmoid where a probability is meant, and know
that only a pointwise loss teaches one.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rag_retrieval.models.calibration import CALIBRATION_FILE, Calibration, Probabilities, probabilities_of
from rag_retrieval.models.inputs import check_flag, check_pairs
from rag_retrieval.models.loading import score_layer
from rag_retrieval.models.packed_model import Head, packed_outputs, packing_problem, pairs_to_check
from rag_retrieval.models.packing import Packing, on_device, padded_inputs
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.scoring import Precision, ScoringOptions, score_pairs
from rag_retrieval.models.settings import RerankerSettings, write_settings
from rag_retrieval.models.token_batch import TokenBatch, make_batch
from rag_retrieval.models.transformer import TransformerModule


class PairScorer(TransformerModule):
    """A Hugging Face sequence-classification model with one label, and the encoder of its pairs.

    `pair_encoder` turns texts into ids, `settings` is what is saved beside the weights. `calibration` is what lay
    beside the weights when they were loaded; further training makes it wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pair_encoder: PairEncoder,
        settings: RerankerSettings,
        new_parameters: set[str],
        attn_implementation: str | None = None,
    ):
        super().__init__(model, new_parameters)
        self.pair_encoder = pair_encoder
        self.settings = settings
        self.calibration: Calibration | None = None
        if (layer := score_layer(model)) is not None:
            layer.register_forward_hook(score_in_float32)
        self.packing_problem = self._packing_problem(attn_implementation)

    def _packing_problem(self, attn_implementation: str | None) -> str | None:
        if attn_implementation is not None:
            return f"attn_implementation {attn_implementation} was asked for"
        if self.packed_head is None:
            return f"no padding-free forward for {self.config.model_type}"
        batch = make_batch(pairs_to_check(self.model, self.pair_encoder))
        return packing_problem(self.model, self.padded_scores, self.packed_scores, batch, self.half_tolerance)

    @property
    def tokenizer(self):
        return self.pair_encoder.tokenizer

    @property
    def shares_queries(self) -> bool:
        """Whether the query of consecutive pairs is computed once: packed, and causal."""
        return self.causal and self.packs

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """Scores (logits) of the pairs: [pairs], float32, on the model's device."""
        return self.packed_scores(batch) if self.packs else self.padded_scores(batch)

    def packed_scores(self, batch: TokenBatch) -> torch.Tensor:
        packing = Packing(batch, self.causal, self.device, self.first_position)
        # [row, hidden], or [texts, hidden] where the last layer computes no more (`prune_last_layer`)
        hidden = packed_outputs(self.model, batch, packing).last_hidden_state[0]
        return self.packed_head(self.model, hidden, packing).view(-1).float()

    def padded_scores(self, batch: TokenBatch) -> torch.Tensor:
        device = self.device
        inputs = padded_inputs(batch, self.tokenizer.pad_token_id, device)
        return self.scores_of(inputs, on_device(batch.lengths, device))

    def scores_of(self, inputs: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        """Scores of the Hugging Face model's own inputs, padded at the right: [pairs], float32.

        inputs: each [pairs, longest]. lengths: tokens of each pair: [pairs], int64, on the same device.
        """
        raise NotImplementedError

    @cached_property
    def packed_head(self) -> Head | None:
        """What turns packed hidden states into scores; None for a family that has none here."""
        raise NotImplementedError

    def compute_score(
        self,
        pairs: Sequence[Sequence[str]] | Sequence[str],
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        show_progress_bar: bool | None = None,
        devices: Sequence[str | torch.device] | None = None,
        precision: Precision | None = None,
    ) -> torch.Tensor:
        """Scores of (query, document) pairs: [pairs], float32, on the CPU, in the order given.

        pairs: a list of [query, document], or one such pair. An empty list gives an empty tensor. Equal pairs are
        scored once and get the same score.
        batch_size: pairs per forward pass at most; a forward is bounded by its tokens besides, and on a GPU that
        bound is halved where memory runs out. max_length: tokens per pair; None means the model's own.
        normalize: values in [0, 1], calibrated where the model has a calibration, else the sigmoid, which is no
        probability after RankNet or listwise training. `probabilities` says which. Rank by the scores, which do not tie
        where probabilities saturate.
        show_progress_bar: None shows one on a terminal when there are more than `10 * batch_size` pairs.
        devices: such as ["cuda:0", "cuda:1"]: a thread scores on each, with a copy of the model for the time of the
        call. None: the model's own device. `score_over_processes` shares more work out, to more devices.
        precision: of autocast: "no", "bf16", "fp16" (GPU alone). None is half precision for float32 weights on
        CUDA and none on the CPU, where "bf16" is faster if the CPU has instructions for it.
        Scoring runs in eval mode without gradients; the mode the model was in is restored. Raises ValueError
        naming the position of a bad pair, and what a forward raises.
        """
        check_flag("normalize", normalize)
        if show_progress_bar is not None:
            check_flag("show_progress_bar", show_progress_bar)
        options = ScoringOptions(batch_size, max_length, precision)
        scores = score_pairs(self, check_pairs(pairs), options, devices, show_progress_bar)
        return probabilities_of(scores, self.calibration).values if normalize else scores

    def probabilities(
        self,
        pairs: Sequence[Sequence[str]] | Sequence[str],
        batch_size: int = 256,
        max_length: int | None = None,
        show_progress_bar: bool | None = None,
        devices: Sequence[str | torch.device] | None = None,
        precision: Precision | None = None,
    ) -> Probabilities:
        """What `compute_score(normalize=True)` gives, with the calibration that made it or None for the sigmoid.
        Options as for `compute_score`."""
        scores = self.compute_score(
            pairs, batch_size, max_length, show_progress_bar=show_progress_bar, devices=devices, precision=precision
        )
        return probabilities_of(scores, self.calibration)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder (safetensors, config, tokenizer) plus `reranker_config.json`.

        state_dict: weights of this module, where an engine has gathered them; default its own.
        A calibration is not written, and one that lies in the folder is removed: the weights may be others.
        """
        folder = Path(folder)
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
        # Without this, sentence-transformers would apply a sigmoid that saturates after listwise training
        self.model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        if self.model.config.num_labels == 1:  # servers and pipelines give the raw score by it; a causal model has 2
            self.model.config.problem_type = "regression"
        self.save_weights(folder, state_dict)
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
