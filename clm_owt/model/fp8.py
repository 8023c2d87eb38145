"""FP8 for GPT-2: its Conv1D layers as nn.Linear, which torchao and Transformer Engine can convert, and back.

Not run on an FP8 device by the project yet; torchao's conversion is tested on a CPU.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import apply_fp8_autowrap, convert_model, convert_model_to_fp8_ao
from accelerate.utils.dataclasses import FP8BackendType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clm_owt.errors import InputError
from clm_owt.model.gpt2 import GPT2ForPretraining


def convert(model: GPT2ForPretraining, accelerator: Accelerator) -> str:
    """Convert the products of the transformer blocks to FP8, in place, with the backend of the Accelerate config, and
    say how many. The head stays as it is: it is the embedding, and its product belongs to the loss.

    Raises InputError where the device has no FP8, or where nothing was converted.
    """
    if accelerator.device.type != "cuda" or torch.cuda.get_device_capability(accelerator.device) < (8, 9):
        raise InputError(
            f"accelerate config: mixed_precision fp8 needs an NVIDIA GPU of Ada, Hopper or later, this is "
            f"{accelerator.device.type}; use accelerate_configs/single_gpu.yaml (bf16), or cpu.yaml"
        )
    if accelerator.fp8_backend == FP8BackendType.AO:
        handler = accelerator.ao_recipe_handler
        backend = partial(
            convert_model_to_fp8_ao, config=handler.config, module_filter_func=handler.module_filter_func
        )
    elif accelerator.fp8_backend == FP8BackendType.TE:
        backend = partial(convert_model, _convert_ln=False)
    else:
        raise InputError(
            f"accelerate config: fp8 backend {accelerator.fp8_backend.value} is not supported; use AO (torchao) or TE"
        )
    converted, layers = convert_blocks(model, backend)
    if accelerator.fp8_backend == FP8BackendType.TE:
        apply_fp8_autowrap(model, accelerator.te_recipe_handler or accelerator.fp8_recipe_handler)
    return f"FP8 ({accelerator.fp8_backend.value}): {converted} of {layers} layers of the transformer blocks"


def convert_blocks(model: GPT2ForPretraining, backend: Callable[[nn.Module], object]) -> tuple[int, int]:
    """Hand the blocks to `backend` with nn.Linear in place of Conv1D; how many of their layers it converted, and how
    many there are. Raises InputError where it converted none: the run would be bf16 under another name."""
    conv1d_to_linear(model)
    with torch.no_grad():
        backend(model.transformer.h)
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in model.transposed_weights]
    converted = sum(type(layer) is not nn.Linear for layer in layers)
    if converted == 0:
        raise InputError(
            f"accelerate config: mixed_precision fp8 converted none of the {len(layers)} layers of the transformer "
            f"blocks (dimensions must be multiples of 16: n_embd {model.config.n_embd}); change n_embd, or use bf16"
        )
    return converted, len(layers)


@torch.no_grad()
def conv1d_to_linear(model: GPT2ForPretraining) -> None:
    """Replace every Conv1D (weight [in, out]) by an nn.Linear (weight [out, in]) of the same values, and note the name
    of each such weight in `model.transposed_weights`: what is saved and loaded is in GPT-2's layout."""
    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        conv = model.get_submodule(name)
        inputs, outputs = conv.weight.shape
        linear = nn.Linear(inputs, outputs, device=conv.weight.device, dtype=conv.weight.dtype)
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
        model.set_submodule(name, linear)
    model.transposed_weights = frozenset(f"{name}.weight" for name in names)


def transpose_linear_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, or moments of them as `<parameter>/<moment>`, from the model's layout to GPT-2's, or back,
    which is the same: what conv1d_to_linear has transposed is transposed, all else as it is."""
    transposed = getattr(model, "transposed_weights", frozenset())

    def lay(name: str, tensor: Tensor) -> Tensor:
        return tensor.t().contiguous() if name.split("/")[0] in transposed and tensor.dim() == 2 else tensor

    return {name: lay(name, tensor) for name, tensor in tensors.items()}
