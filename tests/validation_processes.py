"""What each process of tests/train/embedding/test_validation_processes.py does; spawned ones import it by this name."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from rag_retrieval.data.collection import beir_collection
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.train.embedding import shared_encoding
from rag_retrieval.train.embedding.shared_encoding import SharedEncoding
from rag_retrieval.train.embedding.validation import EmbeddingValidation


def run(rank: int, world: int, model: str, folder: str) -> None:
    """Join a gloo group of `world` processes, validate, and write what came to `folder/RANK.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", timedelta(seconds=600), world_size=world, rank=rank)
    torch.save(validated(model, Path(folder) / "toy"), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def validated(model: str, toy: Path) -> dict:
    """Vectors and values of a model on the documents of a toy folder, in blocks of 16 texts."""
    shared_encoding.BLOCK, shared_encoding.GATHERED = 16, 5
    collection, embedder = beir_collection(toy, "train"), EmbeddingModel.from_pretrained(model, pooling="mean").eval()
    forwards = []
    embedder.register_forward_pre_hook(lambda module, arguments: forwards.append(len(arguments[0])))
    encoder, accelerator = embedder.text_encoder, Accelerator(cpu=True)
    encoding = SharedEncoding(collection, encoder, accelerator, max_tokens=60, padded=not embedder.packs, batch_size=4)
    with torch.no_grad():
        outputs = encoding(embedder)
        values = EmbeddingValidation(collection, encoding, objective=Objective(()))(embedder, 0)
    vectors = outputs and [side["dense"].values.numpy() for side in outputs]
    own = sum(len(places) for places, _ in encoding.batches)
    return {"vectors": vectors, "values": values, "forwards": len(forwards), "own": own}
