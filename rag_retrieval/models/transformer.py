"""What rerankers and embedders share: a Hugging Face model whose batches are packed where that is exact."""

from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.loading import check_max_length, first_position
from rag_retrieval.models.packed_attention import kernel_problem
from rag_retrieval.models.packed_model import HALF_TOLERANCE, sliding_window


class TransformerModule(nn.Module):
    """`model` is the Hugging Face model, `new_parameters` names the parameters that no checkpoint gave.

    `packing_problem` says why batches of this model are padded; None where they are packed, which is so unless
    the caller named an `attn_implementation` or the family fails the check. `fitting_tokens` is the most that a
    forward of scoring may hold since one ran out of GPU memory; None where none did.
    """

    half_tolerance = HALF_TOLERANCE
    causal: bool  # whether tokens attend only to what stands before them
    tokenizer: PreTrainedTokenizerBase
    packing_problem: str | None

    def __init__(self, model: PreTrainedModel, new_parameters: set[str]):
        super().__init__()
        self.model = model
        self.new_parameters = new_parameters
        self.fitting_tokens: int | None = None
        # a new module starts in train mode, but from_pretrained leaves the Hugging Face model in eval mode
        self.training = model.training
        self.first_position = first_position(model)

    @property
    def config(self):
        """The Hugging Face configuration: engines read hidden sizes from it."""
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str] | None:
        """The layer classes that FSDP wraps one by one, as the family names them, without that of embeddings whose
        weights are the output layer's too: one group has to have both."""
        names, output = self.model._no_split_modules, self.model.get_output_embeddings()
        if not names or output is None or output.weight is not self.model.get_input_embeddings().weight:
            return names
        holders = {type(module).__name__ for module in self.model.modules() if has_parameter(module, output.weight)}
        return [name for name in names if name not in holders]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def packs(self) -> bool:
        """Whether batches are computed without padding, on the present device and under the present autocast."""
        device = self.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.model.dtype
        return self.packing_problem is None and kernel_problem(device, dtype, *self._attention_kind) is None

    @cached_property
    def _attention_kind(self) -> tuple[tuple[int, int], int, bool, bool]:
        """What `kernel_problem` asks of a model, after device and dtype."""
        config = self.config.get_text_config()
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return (heads, key_heads), size, self.causal, sliding_window(self.model) > 0

    def check_max_length(self, max_length: int) -> None:
        """Raises ValueError for more tokens than the model has positions for."""
        check_max_length(max_length, self.model)

    def save_weights(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """A plain Hugging Face folder: safetensors, config, tokenizer. state_dict: of this module; default its own."""
        if state_dict is not None:
            # engines give a tied output embedding a second time; what transformers saves has it once
            names = {name for name, _ in chain(self.model.named_parameters(), self.model.named_buffers())}
            tied = self.model.state_dict().keys() - names
            bare = {name.removeprefix("model."): value for name, value in state_dict.items() if name[:6] == "model."}
            state_dict = {name: value for name, value in bare.items() if name not in tied}
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.tokenizer.save_pretrained(folder)


def has_parameter(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(each is parameter for each in module.parameters())
