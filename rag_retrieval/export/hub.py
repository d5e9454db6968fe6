"""`push_to_hub`: a model's folder with its card, to a Hugging Face hub, or to a folder to look at before.

What is uploaded is a copy (hard links, where the file system has them) in which only the card may differ; the model's
own folder is never changed. No token is read, shown or written here: huggingface_hub finds it, in HF_TOKEN or where
`hf auth login` has put it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from rag_retrieval.core.files import lock_file_of, locked
from rag_retrieval.models.embedding_files import is_embedder
from rag_retrieval.models.inputs import check_flag
from rag_retrieval.models.settings import ModelFiles, check_model_folder, parsing
from rag_retrieval.train.card import CARD, MARK, About, Kind, RunRecord, model_card, read_run_record
from rag_retrieval.train.embedding.card import EMBEDDER
from rag_retrieval.train.pretrain.card import PRETRAINED
from rag_retrieval.train.reranker.card import RERANKER

WEIGHTS = ("*.safetensors", "*.onnx", "*.xml")
MEASURED = {"data", "candidates", "queries", "pairs", "model", "baseline", "comparison", "config"}


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    commit_message: str = "Upload a model",
    language: Sequence[str] = (),
    license: str | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
) -> str:
    """Upload a model with its card; the repository is made where it is not there. Returns its address.

    private: of a repository that is made now. language, license: for the card, as the hub names them (`en`, `mit`).
    evaluations: folders of `rag-retrieval evaluate` for this model, whose figures join the card. HF_TOKEN and
    HF_ENDPOINT are huggingface_hub's.

    Raises ValueError for a folder without a model, and as `stage`; OSError (huggingface_hub's) where the hub cannot be
    reached or refuses.
    """
    check_flag("private", private)
    folder = checked_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=folder.parent) as staged:
        stage(folder, staged, repo_id, language=language, license=license, evaluations=evaluations)
        api = HfApi(library_name="rag_retrieval")
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=staged, commit_message=commit_message)
    return str(repository)


def stage(
    folder: str | os.PathLike,
    target: str | os.PathLike,
    name: str,
    *,
    language: Sequence[str] = (),
    license: str | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
) -> None:
    """What `push_to_hub` uploads, into the folder `target`, which must be empty or not there yet. name: the repo_id.

    Hidden and temporary files are left out. A card that was edited (its line MARK is gone), or whose run is not known,
    is uploaded as it is. Raises ValueError for a name that no hub takes, for a link that leads out of the folder,
    for a target that is not empty or that another command writes to, and where language, license or evaluations are
    given for a card that stays.
    """
    folder, target = checked_folder(folder), Path(target)
    validate_repo_id(name)
    files = files_to_upload(folder)
    about = About(name, tuple(language), license, tuple(read_evaluation(path, folder) for path in evaluations))
    card = chosen_card(folder, about)
    with locked(lock_file_of(target), f"{target}: another command writes to it; give another folder"):
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} is not empty; give a new folder")
        for source in files:
            link_or_copy(source, target / source.relative_to(folder))
        (target / CARD).unlink(missing_ok=True)  # it may be a link to the model's own
        (target / CARD).write_text(card, encoding="utf-8")


def files_to_upload(folder: Path) -> list[Path]:
    """All files but hidden and temporary ones. Raises ValueError for one that lies outside the folder: a hub's own
    cache links to files beside it, anything else that a link leads to is not of the model."""
    files = []
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in place.parts) or file.suffix == ".tmp":
            continue
        real = file.resolve()
        if not real.is_relative_to(folder) and real.parent != folder.parents[1] / "blobs":
            raise ValueError(f"{file} is a link to {real}, outside of the model's folder; put the file itself there")
        files.append(file)
    return files


def checked_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    check_model_folder(folder)
    if not any(file for pattern in WEIGHTS for file in folder.rglob(pattern)):
        raise ValueError(f"{folder}: no weights in it (found none of {', '.join(WEIGHTS)})")
    return folder


def chosen_card(folder: Path, about: About) -> str:
    """The folder's own card where it must stay, else a new one."""
    run = read_run_record(folder.parent)
    present = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
    if present is None or (MARK in present and run is not None):
        return model_card(folder, run, about, kind_of(folder, run))
    if about.language or about.license or about.evaluations:
        reason = "its run is not beside it" if MARK in present else "it was edited"
        raise ValueError(
            f"{folder / CARD}: {reason}, so it goes as it is; write language, license and figures into it, or remove it"
        )
    return present


def kind_of(folder: Path, run: RunRecord | None) -> Kind:
    """What the folder holds; that an encoder was pre-trained is known from its run alone."""
    if run is not None and run.configuration.get("task") == "pretrain":
        return PRETRAINED
    return EMBEDDER if is_embedder(ModelFiles(str(folder))) else RERANKER


def read_evaluation(output: str | os.PathLike, model: Path) -> dict[str, Any]:
    """result.json of an evaluation's output folder, or that file. ValueError for another file, or another model's."""
    path = Path(output).expanduser()
    path = path / "result.json" if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"evaluations: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"evaluations: {path} is no JSON file: {error}") from error
    missing = MEASURED - result.keys() if isinstance(result, dict) else MEASURED
    if missing:
        raise ValueError(f"evaluations: {path} is no result of `rag-retrieval evaluate`: it has no {min(missing)}")
    with parsing(path, "evaluate the model again"):
        measured = Path(result["config"]["model"]).expanduser()
    if measured.exists() and not measured.samefile(model):  # where it is gone, the model may have been moved
        raise ValueError(f"evaluations: {path} is of {measured}, and not of {model}; evaluate this model")
    return result


def link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
