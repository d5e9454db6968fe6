"""The keys of an embedder's configuration that say what a text becomes: a dense vector, lexical weights, token vectors,
or several of them, and how they are trained together.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ValidationInfo, field_validator

from rag_retrieval.core.config import NAMES, Only, key, shown_value
from rag_retrieval.losses.embedding import ENSEMBLE
from rag_retrieval.losses.unified import DISTILLATION_WEIGHTS, ENSEMBLE_WEIGHTS, LOSS_WEIGHTS
from rag_retrieval.models.options import from_json
from rag_retrieval.models.representations import REPRESENTATIONS, Representation
from rag_retrieval.train.config import TrainingConfig

DENSE = Only("representations with dense", lambda config: "dense" in config.representations)
SEVERAL = Only("several representations", lambda config: len(config.representations) > 1)
LEXICAL = Only("representations with lexical", lambda config: "lexical" in config.representations)
MULTI_VECTOR = Only("representations with multi_vector", lambda config: "multi_vector" in config.representations)
TOKENS_ALONE = Only("representations multi_vector alone", lambda config: config.representations == ["multi_vector"])
SPLADE = Only("lexical_method splade", lambda config: config.lexical_method == "splade")
DISTILLED = Only("runs with use_self_distill", lambda config: config.use_self_distill)

WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "representation_weights": LOSS_WEIGHTS,
    "ensemble_weights": ENSEMBLE_WEIGHTS,
    "self_distill_weights": DISTILLATION_WEIGHTS,
}
Weights = Annotated[dict[str, float] | None, BeforeValidator(from_json)]


def split_metric(name: str) -> tuple[str, str]:
    """("lexical", "ndcg@10") of lexical/ndcg@10; ("", name) of a metric of the whole model."""
    before, slash, metric = name.partition("/")
    return (before, metric) if slash and before in REPRESENTATIONS else ("", name)


def _default_weights(name: str) -> Callable[[Any], dict[str, float]]:
    return lambda config: _of_run(WEIGHTS[name], config.representations)


def _of_run(weights: Mapping[str, float], representations: list[str]) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if name in (*representations, ENSEMBLE)}


class RepresentationKeys(TrainingConfig):
    """What `EmbeddingConfig` has of them."""

    groups: ClassVar = TrainingConfig.groups | {"representations": "Representations"}

    representations: Annotated[list[Representation], NAMES] = key(
        "What a text becomes, one or several: dense, a vector; lexical, weights of tokens; multi_vector, a vector for "
        "each token, compared by MaxSim.", ["dense"], min_length=1)
    lexical_method: Literal["linear", "splade"] | None = key(
        "Weight of a token: linear, ReLU of a linear layer, of the text's own tokens; splade, log(1 + ReLU) of the "
        "greatest logit of a masked language model, of any token of its vocabulary. Default linear.",
        only=LEXICAL, derive=lambda config: "linear")
    colbert_dim: int | None = key(
        "Width of new token vectors. Default 128 where they are the only representation, else the model's hidden size.",
        only=MULTI_VECTOR, ge=1)
    mean_maxsim: bool | None = key(
        "The loss divides a MaxSim by the number of the query's vectors, as it does beside other representations. "
        "Default false.", only=TOKENS_ALONE, derive=lambda config: False)
    query_expansion: bool | None = key(
        "Queries are filled up to query_max_len with mask tokens, whose vectors are compared too. Default the model's "
        "own, true for new token vectors.", only=TOKENS_ALONE)
    attend_to_expansion_tokens: bool | None = key(
        "The other tokens of a query see its mask tokens. Default the model's own, false for new token vectors.",
        only=TOKENS_ALONE)
    skiplist_words: Annotated[list[str] | None, NAMES] = key(
        'Tokens of documents that have no vector; "" for none. Default the model\'s own, the punctuation of ASCII for '
        "new token vectors.", only=TOKENS_ALONE)
    fix_encoder: bool = key("Train the heads of the representations alone, and nothing of the model below.", False)
    representation_weights: Weights = key(
        'Weight of the loss of each representation and of the ensemble, as {"lexical": 0.1}; the loss is their '
        "weighted sum over their number. Default dense 1, lexical 0.1, multi_vector 1, ensemble 1.",
        only=SEVERAL, derive=_default_weights("representation_weights"))
    ensemble_weights: Weights = key(
        "Weight of each representation's score in that of the ensemble, in training and in validation. Default dense "
        "1, lexical 0.3, multi_vector 1.",
        only=SEVERAL, derive=_default_weights("ensemble_weights"))
    use_self_distill: bool = key("Each representation also learns the scores of the ensemble.", False, only=SEVERAL)
    self_distill_start_step: int | None = key(
        "Self-distillation is in the steps whose number, from 0, is above this. Default -1, in all.",
        only=DISTILLED, derive=lambda config: -1, ge=-1)
    self_distill_weights: Weights = key(
        "Weight of each representation's self-distillation. Default dense 1, lexical 0.1, multi_vector 1.",
        only=DISTILLED, derive=_default_weights("self_distill_weights"))
    lambda_query: float | None = key(
        "Weight of the FLOPS regularization of queries. Default 5e-5.",
        only=SPLADE, derive=lambda config: 5e-5, ge=0)
    lambda_document: float | None = key(
        "Weight of the FLOPS regularization of documents. Default 3e-5.",
        only=SPLADE, derive=lambda config: 3e-5, ge=0)
    flops_ramp_steps: int | None = key(
        "Optimizer steps in which both weights rise from 0, quadratically. Absent: the first third of the run.",
        only=SPLADE, ge=0)

    @field_validator("representations", mode="after")
    @classmethod
    def _in_order(cls, names: list[str]) -> list[str]:
        return [name for name in REPRESENTATIONS if name in names]

    @field_validator("skiplist_words", mode="after")
    @classmethod
    def _without_empty(cls, words: list[str] | None) -> list[str] | None:
        return words and [word for word in words if word]

    @field_validator(*WEIGHTS, mode="after")
    @classmethod
    def _complete(cls, given: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        """Those that are not given have their defaults."""
        default = _of_run(WEIGHTS[info.field_name], info.data.get("representations", REPRESENTATIONS))
        if given is None or (len(info.data.get("representations", ())) == 1):
            return given
        for name, weight in given.items():
            if name not in default or weight < 0:
                expected = f"expected weights of at least 0 for {', '.join(default)}"
                raise ValueError(f"{expected}, found {shown_value({name: weight})}")
        weights = default | given
        if not any(weights.values()):
            raise ValueError("expected a weight above 0, found none")
        return weights

    @property
    def expands_queries(self) -> bool:
        """As far as the configuration says."""
        return self.representations == ["multi_vector"] and self.query_expansion is not False

    @property
    def has_large_scores(self) -> bool:
        """Whether scores are sums far above 1, which a temperature made for cosines would make one-hot: SPLADE alone,
        and MaxSim alone where it is not divided."""
        return self.representations == ["lexical"] and self.lexical_method == "splade" or self.mean_maxsim is False

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.fix_encoder and self.representations == ["dense"]:
            yield "fix_encoder", "leaves a dense vector nothing to learn; give representations that have heads"
        if self.fix_encoder and self.lexical_method == "splade":
            yield "fix_encoder", "does not go with lexical_method splade, whose head is the model's own; leave it out"
        if self.fix_encoder and self.fine_tune_type != "sft":
            yield "fix_encoder", f"does not go with fine_tune_type {self.fine_tune_type}; keep one of the two"
