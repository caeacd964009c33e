"""Loading a model without its experts.

transformers lets a quantizer change a model between its construction on the meta device and the loading of weights. The
quantizer of this module removes the parameters of the experts there, so that none of them is read or allocated.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_beyond.collect.load import Checkpoint, check_loaded, one_line_errors, quiet_transformers
from moe_beyond.errors import UserError
from moe_beyond.runtime.experts import ExpertsLayer, check_unquantized, experts_layers
from moe_beyond.runtime.storage.stored_tensors import stored_tensors

METHOD = "moe_beyond_without_experts"


@register_quantization_config(METHOD)
class _WithoutExperts(QuantizationConfigMixin):
    """Request to remove the experts."""

    def __init__(self) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]


@register_quantizer(METHOD)
class _ExpertsRemover(HfQuantizer):
    """Removes the parameters of experts before weights are loaded.

    Attributes:
        layers: Experts that were removed.
    """

    layers: dict[int, ExpertsLayer]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.layers = experts_layers(model)
        for layer in self.layers.values():
            for field in layer.layout.fields:
                setattr(layer.module, field.name, None)
            layer.module._is_hf_initialized = True  # type: ignore[assignment]  # noqa: SLF001  (nothing to initialise)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def load_bare(checkpoint: Checkpoint, dtype: str = "auto", device: str = "cpu") -> tuple[Any, dict[int, ExpertsLayer]]:
    """Load a model without its experts, whose parameters are None.

    Args:
        checkpoint: Files of the model.
        dtype: Type to compute in; default: ``"auto"``, the type of the stored weights.
        device: Device (default: ``"cpu"``).

    Returns:
        The model; and position among the MoE layers -> experts, whose layouts have the type to compute in.

    Raises:
        UserError: The experts cannot be moved, the model cannot be loaded, or a weight is missing or has the wrong
            shape.
    """
    where = f"model {checkpoint.name}"
    check_unquantized(where, checkpoint.config)
    checkpoint.fetch_weights()
    stored_tensors(checkpoint.folder, where)  # names a damaged file, which the library's message does not
    with one_line_errors(checkpoint.name), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True, quantization_config=_WithoutExperts(),
        )  # fmt: skip
        model, report = loaded
        check_loaded(checkpoint.name, report)
        remover: Any = model.hf_quantizer
        remover.remove_quantization_config(model)
        if absent := [name for name, tensor in _tensors(model) if tensor.is_meta]:
            raise UserError(f"{where}: {absent[0]} was not loaded; give the complete checkpoint of the model")
        return model.to(device), remover.layers


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
