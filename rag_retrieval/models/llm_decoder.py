"""`LLMDecoder`: Qwen, Llama, Mistral, Gemma and relatives as rerankers.

The text is `query_format + seq + document_format + special_token`; the score is read at the last token of the
special token, by a scalar head or, as Qwen3-Reranker does it, as the logit of yes minus that of no:

    score = logit(yes) - logit(no), so that sigmoid(score) = P(yes | yes or no)

(Nogueira et al., Document Ranking with a Pretrained Sequence-to-Sequence Model, 2020, use the same two tokens.)
The position is found by length, never by looking for padding: a pad token may equal eos, and the special token may be
eos.
"""

import logging
import os
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.decoder_template import INSTRUCTION, decoder_template
from rag_retrieval.models.devices import choose_dtype
from rag_retrieval.models.layerwise import WEIGHT, add_layer_scores, cut_at_layer, shallow_copy
from rag_retrieval.models.loading import (
    check_is_trained,
    check_num_labels,
    check_vocabulary,
    choose_max_length,
    is_decoder,
    load_causal_model,
    load_classifier,
    load_tokenizer,
    lower_case_like,
    set_decoder_pad_token,
    truncates_left,
    warn_of_new_parameters,
)
from rag_retrieval.models.options import ModelOptions, options_among
from rag_retrieval.models.packed_model import (
    HALF_TOLERANCE,
    Head,
    last_token_head,
    packed_outputs,
    pooled_states,
    prune_last_layer,
)
from rag_retrieval.models.packing import Packing, on_device, padded_inputs
from rag_retrieval.models.pair_encoding import PairEncoder, PairTemplate
from rag_retrieval.models.pair_scorer import PairScorer, score_in_float32
from rag_retrieval.models.prompts import (
    PROMPTS,
    Prompt,
    answer_tokens,
    chat_formats,
    known_prompts,
    own_prompt,
)
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.sentence_transformers_files import write_decoder_files
from rag_retrieval.models.settings import (
    FORMAT_NAMES,
    YES_NO_NAMES,
    ModelFiles,
    RerankerSettings,
    choose_setting,
    read_settings,
    resolve_model_path,
)
from rag_retrieval.models.token_batch import TokenBatch

logger = logging.getLogger(__name__)

DEFAULT_FORMATS = {
    "query_format": "query: {}",
    "document_format": "document: {}",
    "seq": "\n",
    "special_token": "\nrelevance",
}
# Of a logit difference, relative where it exceeds 1. Logits are of order 20, and half precision rounds the states
# that they are made of to one part in 256: SmolLM2-135M in bfloat16, packed and padded, differs by 0.04.
YES_NO_TOLERANCE, YES_NO_HALF_TOLERANCE = 1e-3, 0.12


class LLMDecoder(PairScorer):
    """A causal model that scores a pair at its last token. Build it with `from_pretrained`."""

    model_type = "llm_decoder"
    causal = True

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        loss_type: str | None = None,
        num_labels: int = 1,
        query_format: str | None = None,
        document_format: str | None = None,
        seq: str | None = None,
        special_token: str | None = None,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        head: str | None = None,
        instruction: str | None = None,
        yes_token: str | None = None,
        no_token: str | None = None,
        start_layer: int | None = None,
        cutoff_layer: int | None = None,
    ) -> "LLMDecoder":
        """Load a causal language model (with a fresh score head, and a warning) or a trained reranker.

        An argument that is not given comes from the folder: what this library saved there, else the prompt of its own
        chat template or of the known reranker that it is. Where it says nothing, the formats are "query: {}",
        "document: {}", "\\n" and "\\nrelevance". A given one that differs from a saved one wins, with a warning.
        loss_type: ignored; RAG-Retrieval's classes take it here. max_length: tokens per pair; default what the folder
        says, else 512. dtype: of the weights; default float32.

        head: "scalar" (the default), or "yes_no", which needs no new weights: score = logit of yes_token - logit of
        no_token, so that its sigmoid is the probability of yes; with no_token "" the logit of yes alone. Then the
        default formats ask Qwen3-Reranker's question in the tokenizer's own chat template; `{instruction}` in a format
        stands for `instruction`.

        start_layer: a scalar head at every layer from this one on, counted from 1; default as saved, else the last
        layer alone. cutoff_layer: keep the layers up to this one and its head, so that scoring is faster; what is
        saved then is the smaller model.

        Raises ValueError for num_labels other than 1, an encoder, a format without exactly one `{}`, a max_length
        beyond the model's positions, an answer that is not one token, and a yes_no head where there is neither a chat
        template nor formats.
        """
        options = options_among(locals())
        check_num_labels(num_labels)
        return cls.load(ModelFiles(resolve_model_path(model_name_or_path)), options, start_layer=start_layer)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: ModelOptions,
        trained_only: bool = False,
        question: Prompt | None = None,
        start_layer: int | None = None,
    ) -> "LLMDecoder":
        """`from_pretrained` of files that were looked up, on the CPU.

        trained_only: raise ValueError for a model without a trained head, and for one whose prompt is neither given
        nor known. question: what a language model whose prompt is not known is asked with the yes_no head.
        """
        path = files.path
        saved = read_settings(path)
        if saved is not None and saved.model_type != cls.model_type:
            raise ValueError(f"{path} was saved as {saved.model_type}; load it with CrossEncoder.from_pretrained")
        if options.split_special_tokens is not None:
            logger.warning("split_special_tokens is for encoders, and %s is a decoder, which always does", path)
        tokenizer = load_tokenizer(path, options.trust_remote_code)
        lower_case_like(files, tokenizer)
        texts = choose_texts(files, tokenizer, options, saved, trained_only, question)
        formats = {name: texts[name] for name in FORMAT_NAMES}
        template = decoder_template(tokenizer, **formats, instruction=texts.get("instruction"))
        model, new_parameters = load_decoder(path, tokenizer, texts, template, options)
        start_layer = choose_setting("start_layer", start_layer, saved and saved.start_layer, None)
        if start_layer is not None:
            if "head" in texts:
                raise ValueError("start_layer is for head: scalar, and the head is yes_no; leave it out")
            if not add_layer_scores(model, path, start_layer):
                new_parameters = new_parameters | {WEIGHT}
        if options.cutoff_layer is not None:
            if start_layer is None:
                raise ValueError(f"cutoff_layer: {path} has a head at the last layer alone; leave it out")
            model = cut_at_layer(model, start_layer, options.cutoff_layer)
            start_layer, new_parameters = None, new_parameters - {WEIGHT}
        (check_is_trained if trained_only else warn_of_new_parameters)(path, new_parameters)
        set_decoder_pad_token(model, tokenizer, template.suffix[-1])
        check_vocabulary(path, model, tokenizer)
        saved_length, trained = saved and saved.max_len, not new_parameters
        max_length = choose_max_length(options.max_length, saved_length, files, tokenizer, model, trained)
        settings = RerankerSettings(cls.model_type, max_length, **texts, start_layer=start_layer)
        template = replace(template, truncate_left=truncates_left(tokenizer, trained=not new_parameters))
        encoder = PairEncoder(tokenizer, template, max_length, split_special_tokens=True)
        scorer = cls(model, encoder, settings, new_parameters, options.attn_implementation)
        scorer.calibration = read_calibration(path)
        return scorer

    @property
    def answers_yes_or_no(self) -> bool:
        return self.settings.head == "yes_no"

    @property
    def half_tolerance(self) -> float:
        return YES_NO_HALF_TOLERANCE if self.answers_yes_or_no else HALF_TOLERANCE

    @cached_property
    def packed_head(self) -> Head:
        return yes_no_head if self.answers_yes_or_no else last_token_head

    def scores_of(self, inputs: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        backbone = getattr(self.model, self.model.base_model_prefix)
        # the head reads one position per pair, so it is applied to that position alone
        read = last_states(backbone(**inputs, use_cache=False).last_hidden_state, lengths)
        if self.answers_yes_or_no:
            return yes_no_scores(self.model, read)
        return self.model.score(read).squeeze(-1).float()

    def forward(self, batch: TokenBatch, all_layers: bool = False) -> torch.Tensor:
        """Scores (logits) of the pairs: float32 [pairs]. all_layers: those of every head of a model with a start_layer,
        the deepest last: [pairs, heads]."""
        return self.layer_scores(batch) if all_layers else super().forward(batch)

    def layer_scores(self, batch: TokenBatch) -> torch.Tensor:
        backbone, start = self.model.base_model, self.settings.start_layer
        if self.packs:
            packing = Packing(batch, self.causal, self.device, self.first_position)
            outputs = packed_outputs(self.model, batch, packing, output_hidden_states=True)
            states = [pooled_states(hidden[0], packing) for hidden in outputs.hidden_states[start:-1]]
            deepest = pooled_states(outputs.last_hidden_state[0], packing)
        else:
            inputs = padded_inputs(batch, self.tokenizer.pad_token_id, self.device)
            outputs = backbone(**inputs, use_cache=False, output_hidden_states=True)
            lengths = on_device(batch.lengths, self.device)
            states = [last_states(hidden, lengths) for hidden in outputs.hidden_states[start:-1]]
            deepest = last_states(outputs.last_hidden_state, lengths)
        shallow = self.model.layer_scores(torch.stack([backbone.norm(layer) for layer in states]))
        return torch.cat([shallow, self.model.score(deepest).float()], dim=1)

    def at_layer(self, layer: int) -> "LLMDecoder":
        """A scorer that stops at a layer and reads its head, of a model that has a start_layer; packed as this one.

        It shares its weights with this one, for use while this one stays as it is. It has no calibration, which is that
        of another head. Raises ValueError for a layer without a head.
        """
        if self.settings.start_layer is None:
            name = self.model.name_or_path
            raise ValueError(f"cutoff_layers: {name} has a head at the last layer alone; leave it out")
        scorer = shallow_copy(self)
        scorer.model = cut_at_layer(self.model, self.settings.start_layer, layer)
        scorer.model.score.register_forward_hook(score_in_float32)
        if self.packing_problem is None:
            prune_last_layer(scorer.model)
        scorer.settings, scorer.calibration = replace(self.settings, start_layer=None), None
        return scorer

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As of every scorer, and the files by which sentence-transformers lays out a pair as here."""
        super().save_pretrained(folder, state_dict)
        write_decoder_files(Path(folder), self.pair_encoder, self.settings)


def last_states(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The state of each text's last token: [texts, hidden]. hidden: [texts, longest, hidden], padded at the right."""
    # len(lengths) would be a constant in a traced graph
    rows = torch.arange(lengths.shape[0], device=hidden.device)
    return hidden[rows, lengths - 1]


# ---- what it is asked -----------------------------------------------------------------------------------


def choose_texts(
    files: ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    options: ModelOptions,
    saved: RerankerSettings | None,
    trained_only: bool,
    question: Prompt | None,
) -> dict[str, str]:
    """The fields of RerankerSettings that the head needs: given, else saved, else the folder's own, else the default.

    trained_only, question: as of `LLMDecoder.load`.
    """
    default_head = "yes_no" if trained_only and files.is_language_model else "scalar"
    head = choose_setting("head", options.head, saved and (saved.head or "scalar"), default_head)
    answers, names = head == "yes_no", (*FORMAT_NAMES, *YES_NO_NAMES)
    given = options.given(*names)
    own = {}
    if saved is None and not set(FORMAT_NAMES) <= given.keys():
        own = own_prompt(files, tokenizer, options.instruction) or {}
    if saved is not None and (saved.head or "scalar") != head:
        saved = None  # it was asked another question
    if saved is None and not set(FORMAT_NAMES) <= own.keys() | given.keys():
        own = default_texts(files, tokenizer, options, head, trained_only, question)
    if not answers:
        own, given, names = *without_answers(own, given, options.instruction), FORMAT_NAMES
    chosen = {}
    for name in names:
        default = own.get(name, getattr(question or PROMPTS["en"], name, None))
        chosen[name] = choose_setting(name, given.get(name), saved and getattr(saved, name), default)
    if not answers:
        return chosen
    if options.instruction is not None:
        check_instruction(chosen)
    return chosen | {"head": head}


def default_texts(
    files: ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    options: ModelOptions,
    head: str,
    trained_only: bool,
    question: Prompt | None,
) -> dict[str, str]:
    """The texts of a model that does not say how it is asked. Raises ValueError where a trained one must say it."""
    if head == "scalar" and not trained_only:
        return DEFAULT_FORMATS
    if head == "scalar" or (trained_only and options.head is None and question is None):
        raise ValueError(missing_prompt(files))
    question = question or PROMPTS["en"]
    texts = chat_formats(tokenizer, question.system, question.user) | question._asdict()
    return {name: texts[name] for name in (*FORMAT_NAMES, *YES_NO_NAMES)}


def missing_prompt(files: ModelFiles) -> str:
    needs = "query_format, document_format, seq and special_token"
    if files.is_language_model:
        needs += ', with yes_token and no_token, or head="yes_no" alone to ask the question of Qwen3-Reranker'
    return (
        f"{files.path}: a decoder ({files.architecture or files.config.get('model_type')}) that does not say which "
        f"prompt it was trained with; give {needs}. Known are {', '.join(prompt.models for prompt in known_prompts())}"
    )


def without_answers(
    own: dict[str, str], given: dict[str, str], instruction: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Of two sets of texts, what a classification head is asked: the formats, the instruction filled in."""
    if instruction is not None:
        check_instruction(own | given)
    for name in ("yes_token", "no_token"):
        if name in given:
            logger.warning("%s is for head: yes_no, and the head is scalar; ignored", name)
    text = own.get("instruction", "") if instruction is None else instruction
    own = {name: own[name].replace(INSTRUCTION, text) for name in FORMAT_NAMES if name in own}
    return own, {name: given[name].replace(INSTRUCTION, text) for name in FORMAT_NAMES if name in given}


def check_instruction(texts: dict[str, str]) -> None:
    """Raises ValueError for formats that have no place for an instruction, though one is given."""
    if not any(INSTRUCTION in texts.get(name, "") for name in FORMAT_NAMES):
        raise ValueError(
            "an instruction is given, but neither query_format nor document_format has {instruction}, where it "
            "would stand; add it or leave the instruction out"
        )


# ---- the two heads --------------------------------------------------------------------------------------


def load_decoder(
    path: str, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], template: PairTemplate, options: ModelOptions
) -> tuple[PreTrainedModel, set[str]]:
    """The model with the head that the texts are for, and the names of its new parameters."""
    loading = (choose_dtype(options.dtype), options.trust_remote_code, options.attn_implementation)
    if "yes_token" in texts:
        tokens = answer_tokens(tokenizer, texts["yes_token"], texts["no_token"])
        model = load_causal_model(path, *loading)
        restrict_lm_head_to_tokens(model, tokens, template.prefix + template.suffix)
        return model, set()
    model, new_parameters = load_classifier(path, *loading)
    if not is_decoder(model):
        name = type(model).__name__
        raise ValueError(f"{path} is a {name}, an encoder; use CrossEncoder (model_type: bert_encoder)")
    return model, new_parameters


def restrict_lm_head_to_tokens(model: PreTrainedModel, tokens: tuple[int, int | None], sample: list[int]) -> None:
    """Let the model's output embedding give the logits of two tokens, (yes, no), and no other.

    Without a token for no its logit is 0, and the score that of yes alone. The output embedding stays a whole matrix,
    tied to the input's or not, and is saved as such; only the product is cut down to two rows. It is cut inside the
    module's forward, because engines that shard a model gather a module's weights when it is called.

    sample: token ids of one pair. Raises ValueError for a model without an output embedding, and for a family whose
    own forward does something to the logits that is not known here, as it does with the sample's.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"a {type(model).__name__} has no output embedding to read yes and no from; use head: scalar")
    head.forward = partial(two_logits, head, *tokens)  # a partial can be pickled, for processes on other devices
    ids = torch.tensor([sample], device=head.weight.device)
    with evaluating(model):
        own = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        backbone = getattr(model, model.base_model_prefix)
        score = yes_no_scores(model, backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1:])
    half = head.weight.dtype in (torch.bfloat16, torch.float16)
    tolerance = (YES_NO_HALF_TOLERANCE if half else YES_NO_TOLERANCE) * max(1.0, score.abs().item())
    if not (own[0] - own[1] - score).abs() <= tolerance:
        raise ValueError(
            f"a {type(model).__name__} changes its logits in a way that is not known here (its yes minus no is "
            f"{own[0] - own[1]:.4g}, ours {score.item():.4g}); use head: scalar"
        )


def two_logits(head: nn.Linear, yes: int, no: int | None, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [..., width]. Returns [..., 2], float32 whatever the autocast: half precision would tie documents."""
    rows = two_rows(head.weight, yes, no)
    bias = None if head.bias is None else two_rows(head.bias, yes, no)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), rows, bias)


def two_rows(values: torch.Tensor, yes: int, no: int | None) -> torch.Tensor:
    """values: [vocabulary, ...]. Returns [2, ...], float32; zeros for a token that is not read."""
    return torch.stack((values[yes], torch.zeros_like(values[yes]) if no is None else values[no])).float()


def yes_no_scores(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [pairs, width], at the last token. Returns [pairs], float32."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits[:, 0] - logits[:, 1]


def yes_no_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    return yes_no_scores(model, pooled_states(hidden, packing))
