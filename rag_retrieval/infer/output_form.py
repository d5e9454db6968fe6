"""The form in which `Embedder.encode` gives representations: which of them, how many numbers, in which precision.

Nothing here imports torch.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import get_args

import numpy as np
from tokenizers import Tokenizer

from rag_retrieval.infer.backend import EmbedderBackend
from rag_retrieval.infer.encoded_texts import EncodedTexts, LexicalWeights
from rag_retrieval.models.inputs import check_flag, check_list, check_number
from rag_retrieval.models.matching import pool_token_vectors
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, REPRESENTATIONS
from rag_retrieval.models.vectors import Int8Ranges, VectorPrecision, finish, to_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputForm:
    """names: of the representations, in the order of REPRESENTATIONS. dim, normalize, precision, ranges: of dense
    vectors. pool_factor, protected: of token vectors, see `pool_token_vectors`; they are float16 where the precision
    is, else float32."""

    names: tuple[str, ...]
    dim: int
    normalize: bool
    precision: VectorPrecision
    ranges: Int8Ranges | None
    pool_factor: float
    protected: int

    def rows(self, found: Mapping[str, Sequence]) -> list[tuple]:
        """What a backend gave for some texts, in this form: for each text an entry for each of `names`. Raises
        ValueError for what is not finite."""
        check_finite(found)
        parts = dict(found)
        if DENSE in parts:
            parts[DENSE] = self.dense(parts[DENSE])
        if MULTI_VECTOR in parts:
            parts[MULTI_VECTOR] = [self._tokens(vectors) for vectors in parts[MULTI_VECTOR]]
        return list(zip(*(parts[name] for name in self.names), strict=True))

    def collected(self, rows: Sequence[tuple], tokenizer: Tokenizer) -> EncodedTexts:
        """All texts' rows as one object."""
        columns = dict(zip(self.names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(self.names, ())
        dense, lexical, multi_vector = (columns.get(name) for name in REPRESENTATIONS)
        if dense is not None:
            dense = np.stack(dense) if rows else self.dense(np.empty((0, self.dim), np.float32))
        lexical = None if lexical is None else LexicalWeights.of(lexical, tokenizer)
        return EncodedTexts(dense, lexical, None if multi_vector is None else list(multi_vector))

    def dense(self, vectors: np.ndarray) -> np.ndarray:
        """vectors: of the backend, [texts, dim of the model], float32."""
        return to_precision(finish(vectors, self.dim, self.normalize), self.precision, self.ranges)

    def _tokens(self, vectors: np.ndarray) -> np.ndarray:
        if self.pool_factor > 1:
            vectors = pool_token_vectors(vectors, self.pool_factor, self.protected)
        return vectors.astype("float16" if self.precision == "float16" else "float32", copy=False)


def choose_form(
    backend: EmbedderBackend,
    ranges: Int8Ranges | None,
    outputs: Sequence[str] | None,
    kind: str | None,
    dim: int | None,
    normalize: bool | None,
    precision: VectorPrecision,
    pool_factor: float,
) -> OutputForm:
    """Of the arguments of `Embedder.encode` from `outputs` on. Raises ValueError that names the argument."""
    settings = backend.settings
    names = checked_outputs(outputs, backend)
    if DENSE not in names:
        ignored = [name for name, value in (("dim", dim), ("normalize", normalize)) if value is not None]
        if ignored:
            logger.warning("%s: of dense vectors, which outputs does not name; ignored", ", ".join(ignored))
        dim = normalize = None
    normalize = settings.normalize if normalize is None else normalize
    check_flag("normalize", normalize)
    dim = backend.dim if dim is None else dim
    check_number("dim", dim, 1, "numbers")
    if dim > backend.dim:
        raise ValueError(f"dim: this model's vectors have {backend.dim} numbers, found {dim}")
    if precision not in get_args(VectorPrecision):
        raise ValueError(
            f"precision of vectors must be one of {', '.join(get_args(VectorPrecision))}; found {precision!r}. That of "
            "the computation is an option of Embedder"
        )
    if precision == "int8" and DENSE in names:
        check_ranges(ranges, normalize)
    check_pool_factor(pool_factor, kind, names)
    protected = 1 if settings.is_colbert else 0  # cls, of which bge-m3 gives no token vector
    form = OutputForm(names, dim, normalize, precision, ranges, pool_factor, protected)
    if DENSE in names:
        form.dense(np.empty((0, backend.dim), np.float32))  # a dim that does not fit is an error before all work
    return form


def checked_outputs(outputs: Sequence[str] | None, backend: EmbedderBackend) -> tuple[str, ...]:
    """In the order of REPRESENTATIONS; dense for None. Raises ValueError for none and for what the model lacks."""
    names, own = [DENSE] if outputs is None else check_list("outputs", outputs), backend.settings.representations
    for name in names:
        if name not in own:
            given = f"{backend.name} gives {', '.join(own)}"
            raise ValueError(f"outputs: {given}, and {name!r} was asked for; name some of these")
    if not names:
        raise ValueError("outputs: expected at least one representation, found none")
    return tuple(name for name in REPRESENTATIONS if name in names)


def check_ranges(ranges: Int8Ranges | None, normalize: bool) -> None:
    if ranges is None:
        raise ValueError("precision int8 needs ranges: call calibrate(documents) with a sample of them once")
    if ranges.normalized != normalize:
        raise ValueError(
            f"the int8 ranges are of vectors with normalize={ranges.normalized}, and normalize is {normalize}; "
            "calibrate for it"
        )


def check_pool_factor(factor: float, kind: str | None, names: Sequence[str]) -> None:
    if isinstance(factor, bool) or not isinstance(factor, Real) or not 1 <= factor < np.inf:
        raise ValueError(f"pool_factor must be a number of at least 1, found {factor!r}")
    if factor > 1 and kind == "query":
        raise ValueError("pool_factor is for documents, since every vector of a query counts; leave it out")
    if factor > 1 and MULTI_VECTOR not in names:
        logger.warning("pool_factor: of token vectors, which outputs does not name; ignored")


def check_finite(found: Mapping[str, Sequence]) -> None:
    parts = [found[DENSE]] if DENSE in found else []
    parts += [weights for _, weights in found.get(LEXICAL, ())]
    parts += found.get(MULTI_VECTOR, ())
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("the model gave a vector that is not finite; in fp16 a model may overflow: use bf16 or fp32")
