"""The search that a configuration asks for: by words, by vectors, or both fused, over what a work folder keeps.

Models are loaded before anything is indexed, so that a wrong name is reported at once. torch is not imported where
words alone are searched.
"""

import importlib.util
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from rag_retrieval.core.files import WorkFolder
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.words import AUTO, WORDS_VERSION
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.bm25 import Bm25Search, build_bm25
from rag_retrieval.retrieval.candidates import FusedSearch, Search

if TYPE_CHECKING:
    from rag_retrieval.retrieval.encoder import EncoderOptions

BM25_LIBRARIES = ("bm25s", "Stemmer", "jieba")


@dataclass(frozen=True)
class SearchOptions:
    """candidates: bm25, dense, or fused (both by reciprocal rank). encoder: for dense and fused. vector_dtype:
    float16 or float32, on disk. faiss_index: a factory string of FAISS; None searches exactly. seed: of the sample
    that FAISS trains on. language: of the words of bm25, see `words.tokenize`.
    """

    candidates: Literal["bm25", "dense", "fused"]
    encoder: "EncoderOptions | None" = None
    vector_dtype: Literal["float16", "float32"] = "float16"
    faiss_index: str | None = None
    seed: int = 0
    language: str = AUTO


def make_search(options: SearchOptions, corpus: Corpus, work: WorkFolder, device: str) -> Search:
    """Builds what the work folder does not have. Raises ValueError for a model or an index that cannot be."""
    if options.candidates == "bm25":
        return _words(options, corpus, work)
    dense = _vectors(options, corpus, work, device)
    return dense if options.candidates == "dense" else FusedSearch([_words(options, corpus, work), dense])


def _words(options: SearchOptions, corpus: Corpus, work: WorkFolder) -> Bm25Search:
    missing = [name for name in BM25_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"candidates from words need {', '.join(missing)}; run: pip install -e '.[mine]'")
    made_from = [corpus.folder.name, WORDS_VERSION, options.language]
    return Bm25Search(work.stage("bm25", made_from, lambda folder: build_bm25(corpus, folder, options.language)))


def _vectors(options: SearchOptions, corpus: Corpus, work: WorkFolder, device: str) -> Search:
    from rag_retrieval.retrieval.dense import DenseSearch, build_faiss, build_vectors, open_vectors, read_faiss
    from rag_retrieval.retrieval.encoder import load_encoder

    of_encoder = asdict(options.encoder)
    of_encoder.pop("query_prefix")  # the vectors of documents do not depend on it
    encoder = load_encoder(options.encoder, device)
    made_from = [corpus.folder.name, of_encoder | {"model": model_content(options.encoder.model)}, options.vector_dtype]
    folder = work.stage(
        "vectors",
        made_from,
        lambda folder: build_vectors(corpus, encoder.documents, folder, options.vector_dtype),
        resumes=True,
    )
    vectors, index = open_vectors(folder), None
    if options.faiss_index is not None:
        place = work.stage(
            "faiss",
            [folder.name, options.faiss_index, options.seed],
            lambda folder: build_faiss(vectors, options.faiss_index, options.seed, folder),
        )
        index = read_faiss(place)
    return DenseSearch(vectors, encoder.queries, device, index)
