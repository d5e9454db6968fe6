"""Layer-wise rerankers: a score head after several layers of a decoder, so that a part of the layers can score alone.

The deepest head is the model's own `score`, so a saved folder opens elsewhere as an ordinary reranker. The heads
before it are the rows of one matrix, `layer_scores.weight`, and read the layer's states through the model's final
norm, as bge-reranker-v2-minicpm-layerwise does.
"""

import copy

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from rag_retrieval.models.settings import find_file, read_json

WEIGHT = "layer_scores.weight"


class LayerScores(nn.Module):
    """Heads of the layers from `start_layer` to the last but one. weight: [layers, hidden]."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Scores of each layer's states: float32 [texts, layers]. states: [layers, texts, hidden]."""
        with torch.autocast(states.device.type, enabled=False):
            return torch.einsum("lth,lh->tl", states.float(), self.weight.float())


def add_layer_scores(model: PreTrainedModel, path: str, start_layer: int) -> bool:
    """Give the model the heads of its checkpoint, or copies of its own head. Returns whether the checkpoint had them.

    start_layer: the first layer with a head, counted from 1. Raises ValueError for one that the model does not have,
    for a family whose final norm is not known, and for heads of another number of layers.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= start_layer < layers:
        raise ValueError(f"start_layer {start_layer}: {path} has {layers} layers; give one from 1 to {layers - 1}")
    if not isinstance(getattr(model.base_model, "norm", None), nn.Module) or not hasattr(model.base_model, "layers"):
        raise ValueError(f"start_layer: heads at several layers are not known for a {model.config.model_type}")
    own = model.score.weight.detach()
    saved = read_tensor(path, WEIGHT)
    if saved is not None and saved.shape != (layers - start_layer, own.shape[1]):
        raise ValueError(
            f"{path}: {WEIGHT} is {list(saved.shape)}, needed {[layers - start_layer, own.shape[1]]} for the layers "
            f"{start_layer} to {layers - 1}; give the start_layer that it was trained with"
        )
    weight = own.repeat(layers - start_layer, 1) if saved is None else saved.to(own.dtype)
    model.layer_scores = LayerScores(weight.clone())
    return saved is not None


def read_tensor(path: str, name: str) -> torch.Tensor | None:
    """A tensor of the safetensors files of a folder or hub name; None where they do not have it."""
    index = read_json(path, "model.safetensors.index.json")
    file_name = index["weight_map"].get(name) if index else "model.safetensors"
    file = None if file_name is None else find_file(path, file_name)
    if file is None:
        return None
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118


def cut_at_layer(model: PreTrainedModel, start_layer: int, layer: int) -> PreTrainedModel:
    """An ordinary model with one head: the first `layer` layers and the head of the last of them. It shares its weights
    with `model`, which stays as it is.

    Raises ValueError for a layer without a head.
    """
    layers = model.config.num_hidden_layers
    if not start_layer <= layer <= layers:
        raise ValueError(f"cutoff_layer {layer}: this model has heads at the layers {start_layer} to {layers}")
    cut, backbone = shallow_copy(model), shallow_copy(model.base_model)
    setattr(cut, model.base_model_prefix, backbone)
    cut.config = backbone.config = copy.deepcopy(model.config)
    cut.config.num_hidden_layers = layer
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = cut.config.layer_types[:layer]
    backbone.layers = nn.ModuleList([*model.base_model.layers[: layer - 1], shallow_copy(backbone.layers[layer - 1])])
    weight = model.score.weight if layer == layers else model.layer_scores.weight[layer - start_layer][None]
    cut.score = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    cut.score.weight = nn.Parameter(weight.detach())
    del cut.layer_scores
    return cut.train(model.training)


def shallow_copy(module: nn.Module) -> nn.Module:
    """Another module with the same parts, which may be replaced in one and not in the other."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
