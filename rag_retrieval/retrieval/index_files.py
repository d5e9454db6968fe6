"""What the folder of an index says about itself: its parts, and all that it depends on.

    index.json      written last, as a whole
    corpus-.../     texts, ids and metadata (`data.corpus`)
    bm25-.../       words (`bm25`)
    vectors-.../    shards of what a model gives (`vector_shards`); with faiss_index also faiss-.../, and ranges-.../
                    with what was fitted to a sample: ranges of int8, centroids and residual codes of token vectors

A part is a folder whose name holds a digest of all that it was made from. Nothing here imports torch.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_retrieval.core.files import STAGE_NAME, read_json, write_json
from rag_retrieval.data.words import WORDS_VERSION
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.bm25 import BM25
from rag_retrieval.retrieval.config import IndexOptions

INDEX_FILE = "index.json"
FORMAT = 1  # raise it whenever an older index cannot be read any more
STAGE_OF_FILES = (  # by the beginning of their names
    dict.fromkeys(("vectors", "finer", "int8"), DENSE)
    | {"lexical": LEXICAL}
    | dict.fromkeys(("tokens", "token", "centroids", "buckets"), MULTI_VECTOR)
)
# of who opens the index: a folder that came from elsewhere must not decide that its model's code is run
LOCAL_KEYS = {"device", "devices", "trust_remote_code"}


@dataclass(frozen=True)
class IndexState:
    """What index.json says. made_from: all that the index depends on, by name. parts: the name of the folder of each,
    by its kind. sizes: bytes of every file in them. recall: of the nearest documents, by an approximate dense search;
    None where it is exact. token_recall: the same of token vectors, among those by the vectors that are kept.
    token_loss: what these lost (`token_codec.loss_of`); None where nothing was measured."""

    folder: Path
    made_from: dict[str, Any]
    options: IndexOptions
    parts: dict[str, str]
    sizes: dict[str, int]
    recall: float | None = None
    token_recall: float | None = None
    token_loss: dict[str, float] | None = None

    @classmethod
    def read(cls, folder: Path, local: Mapping[str, Any] | None = None) -> "IndexState | None":
        """None where there is no index, or one that is not finished. local: options of `LOCAL_KEYS`. Raises ValueError
        for another format."""
        if not (folder / INDEX_FILE).exists():
            return None
        values = read_json(folder / INDEX_FILE)
        found = values.pop("format", None)
        try:
            parts = values["parts"]
            if found == FORMAT and "corpus" in parts and all(map(STAGE_NAME.fullmatch, parts.values())):
                options = IndexOptions(**values["options"] | (local or {}))
                if options.representations is not None:  # which an older index does not name
                    values["made_from"].setdefault("representations", list(options.representations))
                return cls(folder, **values | {"options": options})
        except (TypeError, KeyError, ValueError, AttributeError):
            pass
        found = "damaged" if found in (FORMAT, None) else f"of the format {found}, and this version reads {FORMAT}"
        raise ValueError(f"{folder / INDEX_FILE}: it is {found}; remove the folder and build the index again")

    def write(self) -> None:
        values = {"format": FORMAT, "made_from": self.made_from, "parts": self.parts, "recall": self.recall}
        values |= {"token_recall": self.token_recall, "token_loss": self.token_loss}
        options = self.options.model_dump(mode="json", exclude=LOCAL_KEYS, exclude_defaults=True)
        write_json(self.folder / INDEX_FILE, values | {"options": options, "sizes": self.sizes})

    def path(self, kind: str) -> Path:
        return self.folder / self.parts[kind]

    @property
    def paths(self) -> dict[str, Path]:
        return {kind: self.folder / name for kind, name in self.parts.items()}

    def check_files(self) -> None:
        """Raises ValueError for a file that is missing or has another size than was written."""
        for name, size in self.sizes.items():
            file = self.folder / name
            found = f"has {file.stat().st_size:,} bytes" if file.is_file() else "is missing"
            if found != f"has {size:,} bytes":
                raise ValueError(
                    f"{file}: {found}, and {size:,} bytes were written; the index is damaged: copy it again, or remove "
                    "its folder and build it again"
                )


def sizes_by_stage(sizes: Mapping[str, int]) -> Counter[str]:
    """Bytes of what each search reads, by the name of its stage, and of the `texts`. sizes: of an IndexState."""
    total = Counter()
    for name, size in sizes.items():
        part, kind = name.partition("-")[0], re.split("[_.]", Path(name).name)[0]
        stage = {"corpus": "texts", "bm25": BM25, "faiss": DENSE}.get(part) or STAGE_OF_FILES.get(kind)
        if stage is not None:
            total[stage] += size
    return total


def sizes_of(folder: Path, parts: dict[str, str]) -> dict[str, int]:
    """Bytes of every file of the parts, by its name in the folder."""
    files = [file for part in parts.values() for file in sorted((folder / part).rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def fingerprint(options: IndexOptions) -> dict[str, Any]:
    """What an index depends on besides its documents, by name."""
    made_from: dict[str, Any] = {}
    if options.bm25:
        made_from["words"] = words_of(options)
    if options.embedder is not None:
        made_from["model"] = model_content(options.embedder)
        made_from |= {name: getattr(options, name) for name in model_names(options)}
        made_from["representations"] = list(options.representations)  # as JSON has it
    if options.faiss_index is not None:
        made_from["faiss_index"] = options.faiss_index
    if options.faiss_index is not None or options.fits_vectors or options.fits_tokens:
        made_from["seed"] = options.seed
    return made_from


def words_of(options: IndexOptions) -> str:
    return f"{options.language}, version {WORDS_VERSION}"


def model_names(options: IndexOptions) -> list[str]:
    """The options that decide on what is kept of the model's output."""
    names = [name for name in EmbedderOptions.model_fields if name not in LOCAL_KEYS]
    names += ["representations"]
    if DENSE in options.representations:
        names += ["dim", "vector_precision", "rescore_precision"]
    if MULTI_VECTOR in options.representations:
        names += ["token_precision", "pool_factor", "has_token_lists"]
    return names


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError that names what differs. What only one of them has does not: a part that is built yet, or one
    that is not asked for now."""
    lines = "".join(
        f"\n  {name}: was {before[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    )
    if lines:
        raise ValueError(
            f"output: {folder} is an index that differs:{lines}\nRestore these, take another output, or remove the "
            "folder to build it anew"
        )


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder that holds other things than an index, or the beginning of one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; give the name of a folder")
    if not folder.exists() or (folder / INDEX_FILE).exists():
        return
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not (STAGE_NAME.fullmatch(name) or name.startswith("."))]
    if others:
        found = f"{folder} holds other things ({', '.join(others[:3])})"
        raise ValueError(f"output: {found}; take a folder that is empty, or is not there yet")
