"""What a cross-encoder and an LLM decoder have in common: a batch of pairs in, one score per pair out.

The score is the raw logit, never a probability: apply torch.sigmoid where a probability is meant, and know
that only a pointwise loss teaches one.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from rag_retrieval.models.model_files import RerankerSettings, resolve_model_path, write_settings
from rag_retrieval.models.pair_batch import PairBatch, make_batch
from rag_retrieval.models.pair_encoding import PairEncoder

SCORING_CHUNK = 8192  # pairs tokenized and sorted together; bounds memory on endless lists


class PairScorer(nn.Module):
    """A Hugging Face sequence-classification model with one label, and the encoder of its pairs.

    `model` is the Hugging Face model, `pair_encoder` turns texts into ids, `settings` is what is saved beside
    the weights, `new_parameters` names the parameters that no checkpoint gave (a fresh head).
    """

    def __init__(
        self, model: PreTrainedModel, pair_encoder: PairEncoder, settings: RerankerSettings, new_parameters: set[str]
    ):
        super().__init__()
        self.model = model
        self.pair_encoder = pair_encoder
        self.settings = settings
        self.new_parameters = new_parameters

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


def check_pairs(pairs) -> list[tuple[str, str]]:
    """The pairs as a list of tuples; a single [query, document] becomes a list of one."""
    if isinstance(pairs, str):
        raise ValueError("pairs must be a list of [query, document], found one string")
    pairs = list(pairs)
    if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
        pairs = [pairs]
    for position, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"pairs[{position}] must be [query, document], found {pair!r:.100}")
        for name, text in zip(("query", "document"), pair, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"pairs[{position}]: the {name} must be a string, found {type(text).__name__}")
    return [(query, document) for query, document in pairs]


def batches_by_length(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Positions in batches of similar length, longest first so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def scoring_mode(scorer: PairScorer):
    """Eval mode, no gradients and, on CUDA with float32 weights, half-precision autocast."""
    was_training = scorer.training
    scorer.eval()
    autocast = nullcontext()
    if scorer.device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        autocast = torch.autocast("cuda", dtype=dtype)
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        scorer.train(was_training)


def load_tokenizer(model_path: str, trust_remote_code: bool):
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(f"{model_path}: its tokenizer ({type(tokenizer).__name__}) has no fast version, which is needed")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def load_classifier(
    model_name_or_path: str, *, num_labels: int, dtype, trust_remote_code: bool, attn_implementation: str | None
) -> tuple[PreTrainedModel, set[str]]:
    """The sequence-classification model with one label, and the names of its newly initialised parameters.

    Weights come in float32 whatever the checkpoint's dtype, unless `dtype` says otherwise: training updates
    float32 weights, and half precision is autocast's business.
    """
    if num_labels != 1:
        raise ValueError(f"num_labels must be 1, found {num_labels}: a reranker gives one score for a pair")
    path = resolve_model_path(model_name_or_path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config.num_labels = 1
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path,
        config=config,
        dtype=dtype or torch.float32,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    return model, set(loading["missing_keys"])


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the score is read at the last token (causal families) and not at the first."""
    return isinstance(model, GenericForSequenceClassification) or hasattr(model, "score")


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input in tokens that the model has positions for; None where nothing bounds it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    # RoBERTa and XLM-RoBERTa number positions from padding_idx + 1
    first = 0 if getattr(embeddings, "padding_idx", None) is None else embeddings.padding_idx + 1
    return limit - first


def check_max_length(max_length: int, model: PreTrainedModel) -> None:
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_len {max_length} is more than the {limit} tokens that this model has positions for")
