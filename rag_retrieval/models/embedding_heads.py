"""Modules of an embedding model with weights of their own, outside of the Hugging Face model: its heads.

Each lies in a folder of the model's: config.json and model.safetensors. A head has `saved_as` (the name of its class
there), `name_prefix` (before the names of its weights in the file), `of_values` and `saved_values` (its config.json).

Token heads make lexical weights and token vectors of token states. They are linear layers too, and lie where
`representation_files` says.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rag_retrieval.models.embedding_files import HeadFiles
from rag_retrieval.models.loading import reading
from rag_retrieval.models.representation_files import LINEAR_FILES, STANFORD, heads_in, is_colbert
from rag_retrieval.models.representations import LEXICAL, MULTI_VECTOR
from rag_retrieval.models.settings import ModelFiles, find_file, parsing, read_json

WEIGHTS = "model.safetensors"
LATENT_FOLDER = "1_LatentAttention"
IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"
ACTIVATIONS = {
    IDENTITY: nn.Identity,
    TANH: nn.Tanh,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid,
}


class LatentAttention(nn.Module):
    """Each token's state attends to trained latent vectors, whatever the other tokens are (NV-Embed,
    https://arxiv.org/abs/2405.17428, section 3.1, with the residual connections and norms of its published weights):

        x = h + O softmax(Q K^T / sqrt(d)) V,   Q = norm(h) W_q,  K = L W_k,  V = L W_v  (heads of width d)
        y = x + W_2 gelu(W_1 norm(x))

    O and W_2 begin as zeros, so that a new one changes nothing.
    """

    saved_as, name_prefix = "LatentAttention", ""  # name_prefix: of the names in the file of its weights

    def __init__(self, hidden_size: int, latents: int = 512, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, hidden_size) / hidden_size**0.5)
        self.query_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        for new in (self.output.weight, self.mlp[2].weight, self.mlp[2].bias):
            nn.init.zeros_(new)

    @classmethod
    def of_values(cls, values: dict[str, Any]) -> "LatentAttention":
        return cls(values["hidden_size"], values["latents"], values["heads"])

    def saved_values(self) -> dict[str, Any]:
        latents, hidden_size = self.latents.shape
        return {"hidden_size": hidden_size, "latents": latents, "heads": self.heads}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: [..., hidden]. Returns the same shape, float32."""
        shape = states.shape
        states = states.float().flatten(0, -2)
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]  # [1, heads, tokens or latents, size]
            for projected in (self.query(self.query_norm(states)), self.key(self.latents), self.value(self.latents))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        states = states + self.output(attended[0].transpose(0, 1).flatten(1))
        return (states + self.mlp(self.mlp_norm(states))).float().view(shape)


class Projection(nn.Linear):
    """activation(W x + b), in float32 whatever the dtype of the weights: a Dense module of sentence-transformers.

    activation: the name of torch's class. has_residual: x, or V x where its width is another, is added to that.
    """

    saved_as, name_prefix = "Dense", "linear."

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = IDENTITY,
        has_residual: bool = False,
    ):
        super().__init__(in_features, out_features, bias)
        self.activation, self.has_residual = activation, has_residual
        self.function = ACTIVATIONS[activation]()
        if has_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    @classmethod
    def of_values(cls, values: dict[str, Any]) -> "Projection":
        sizes = values["in_features"], values["out_features"]
        activation, has_residual = values.get("activation_function", TANH), values.get("use_residual") is True
        return cls(*sizes, values.get("bias", True), activation, has_residual)

    def saved_values(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        residual = {"use_residual": True} if self.has_residual else {}  # older versions do not know the key
        return sizes | {"activation_function": self.activation} | residual

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        vectors = vectors.float()
        projected = self.function(nn.functional.linear(vectors, self.weight.float(), bias))
        if not self.has_residual:
            return projected
        same = self.in_features == self.out_features
        return projected + (vectors if same else nn.functional.linear(vectors, self.residual.weight.float()))


Head = LatentAttention | Projection
HEADS: dict[str, type[Head]] = {head.saved_as: head for head in (LatentAttention, Projection)}


def read_heads(files: ModelFiles) -> list[HeadFiles]:
    """The modules with weights, in their order. Raises ValueError for a Dense that does not take the text's vector, or
    of a ColBERT the token states."""
    heads, takes = [], "token_embeddings" if is_colbert(files) else "sentence_embedding"
    for kind, folder in files.module_list:
        if kind not in ("Dense", "LatentAttention"):
            continue
        values = read_json(files.path, f"{folder}/config.json")
        found = values.get("module_input_name", takes)
        if found != takes:
            raise ValueError(f"{files.path}: {folder}/config.json has module_input_name {found!r}; known is {takes!r}")
        heads.append(HeadFiles(kind, folder, values))
    return heads


def load_head(files: ModelFiles, saved: HeadFiles) -> Head:
    """Raises ValueError for an activation that is not known here, and weights that are not there or do not fit."""
    where = f"{files.path}: {saved.folder}"
    activation = saved.values.get("activation_function", TANH)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}/config.json: activation_function {activation}; known are {', '.join(ACTIVATIONS)}")
    with parsing(f"{where}/config.json"):
        head = HEADS[saved.kind].of_values(saved.values)
    file = find_file(files.path, f"{saved.folder}/{WEIGHTS}")
    old = find_file(files.path, f"{saved.folder}/pytorch_model.bin") if file is None else None
    if file is None and old is None:
        raise ValueError(f"{where}: no {WEIGHTS} in it; copy the model again")
    with reading(where):
        weights = load_file(file) if file else torch.load(old, map_location="cpu", weights_only=True)
        load_weights(head, weights)
    return head


def names_in_file(head: Head, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `load_weights`: of a head's state, as it is saved."""
    return {
        name if name.startswith("residual.") else head.name_prefix + name: value.contiguous()
        for name, value in weights.items()
    }


def load_weights(head: Head, weights: dict[str, torch.Tensor]) -> None:
    """weights: as they stand in a file."""
    head.load_state_dict({name.removeprefix(head.name_prefix): value for name, value in weights.items()})


# ---- token heads ----------------------------------------------------------------------------------------


def load_token_heads(files: ModelFiles) -> dict[str, nn.Module]:
    """By the name of their representation: a `Projection` to one number, and a chain of them for token vectors.

    Raises ValueError as `load_head`.
    """
    if files.architecture == STANFORD:
        return {MULTI_VECTOR: nn.Sequential(linear_of({"weight": stanford_weight(files)}))}
    if is_colbert(files):
        return {MULTI_VECTOR: nn.Sequential(*(load_head(files, saved) for saved in read_heads(files)))}
    heads: dict[str, nn.Module] = {}
    for name in heads_in(files):
        file = find_file(files.path, LINEAR_FILES[name])
        with reading(f"{files.path}: {LINEAR_FILES[name]}"):
            head = linear_of(weights_in(file))
        heads[name] = nn.Sequential(head) if name == MULTI_VECTOR else head
    return heads


def weights_in(file: str) -> dict[str, torch.Tensor]:
    """Of a file of torch.save. Raises ValueError for one that holds more than weights, which would run code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:  # whose text says how to run that code
        raise ValueError("it holds more than weights, and is not loaded; get it from a source you trust") from None


def linear_of(weights: dict[str, torch.Tensor]) -> Projection:
    """A linear layer of a state {weight, bias or not}, in float32."""
    out_features, in_features = weights["weight"].shape
    head = Projection(in_features, out_features, "bias" in weights)
    head.load_state_dict(weights)
    return head


def stanford_weight(files: ModelFiles) -> torch.Tensor:
    """The projection, which lies among the weights of the model."""
    file, old = (find_file(files.path, name) for name in (WEIGHTS, "pytorch_model.bin"))
    with reading(f"{files.path}: linear.weight"):
        if file is None:
            return torch.load(old, map_location="cpu", weights_only=True)["linear.weight"]
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("linear.weight")


def check_sizes(path: str, heads: dict[str, nn.Module], width: int) -> None:
    """Raises ValueError for heads that do not take states of this width or, of lexical weights, do not give one number
    each."""
    for name, head in heads.items():
        size = width
        for layer in [head] if name == LEXICAL else head:
            if layer.in_features != size:
                raise ValueError(
                    f"{path}: its weights of {name} take {layer.in_features} numbers, and are given {size}; they are "
                    "of another model, copy it again"
                )
            size = layer.out_features
        if name == LEXICAL and size != 1:
            raise ValueError(f"{path}: its weights of {name} give {size} numbers for a token, expected 1")


def save_token_heads(folder: Path, heads: nn.ModuleDict, state: dict[str, torch.Tensor], as_colbert: bool) -> None:
    """state: of `heads`. as_colbert: in the files of PyLate, else of BGE-M3."""
    for name in heads:
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if as_colbert:
            for place in range(len(heads[name])):
                layer = {key.partition(".")[2]: value for key, value in own.items() if key.startswith(f"{place}.")}
                (folder / dense_folder(place)).mkdir(exist_ok=True)
                save_file(names_in_file(heads[name][place], layer), folder / dense_folder(place) / WEIGHTS)
        else:
            weights = {key.rpartition(".")[2]: value.detach().cpu().clone() for key, value in own.items()}
            torch.save(weights, folder / LINEAR_FILES[name])


def read_token_heads(folder: Path, heads: nn.ModuleDict, as_colbert: bool) -> None:
    """What `save_token_heads` wrote, into the heads."""
    for name, head in heads.items():
        layers = head if name == MULTI_VECTOR else [head]
        for place, layer in enumerate(layers):
            if as_colbert:
                load_weights(layer, load_file(folder / dense_folder(place) / WEIGHTS))
            else:
                layer.load_state_dict(torch.load(folder / LINEAR_FILES[name], map_location="cpu", weights_only=True))


def dense_folder(place: int) -> str:
    return f"{1 + place}_Dense"
