"""The Accelerator and the hardware of a run, and what of a machine's configuration is refused."""

import itertools
import os
import sys
import warnings
from collections.abc import Sequence

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from clm_owt.errors import InputError
from clm_owt.planning.devices import Hardware, cpu_name, mac_name
from clm_owt.recipe import Recipe
from clm_owt.stopping import launcher
from clm_owt.training import rendezvous
from clm_owt.training.cpu_precision import multiplies_bf16
from clm_owt.training.device_memory import total_memory
from clm_owt.training.processes import PATIENCE, Processes

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor or context parallelism)",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing (the recipe's gradient_checkpointing decides)",
}


def create_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process, seeded. Raises InputError where the machine's configuration cannot keep a
    recipe's promises."""
    quiet_libraries()
    refuse_unkept_settings()
    let_segments_grow()
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(init_method=f"{rendezvous.SCHEME}://", timeout=PATIENCE)]
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"accelerate config: {launched} processes were launched but each came up alone; on CPU use "
            "distributed_type: MULTI_GPU with use_cpu: true and set ACCELERATE_USE_CPU=true in the environment"
        )
    if asks_for("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate config: FSDP comes up as version 1, or on a CPU as a copy of the model in each process; set "
            "fsdp_version: 2 (accelerate_configs/fsdp2.yaml), or on a CPU take accelerate_configs/cpu_2proc.yaml"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would pass over it
        raise InputError("accelerate config: mixed_precision fp16 needs a GPU; on a CPU take no")
    bf16_on_cuda = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
    if bf16_on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"accelerate config: mixed_precision bf16, which {torch.cuda.get_device_name()} has not; take fp16, as "
            "accelerate_configs/single_gpu_fp16.yaml does"
        )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        refuse_slow_bf16()
    set_seed(recipe.seed)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    return accelerator


def refuse_slow_bf16() -> None:
    """Raises InputError on a processor without instructions for bf16."""
    if not multiplies_bf16():
        raise InputError(
            f"accelerate config: mixed_precision bf16 on {cpu_name()}, which has neither AVX512_BF16 nor AMX and "
            "would be slower than in float32; take no, as accelerate_configs/cpu.yaml does"
        )


def let_segments_grow() -> None:
    """Unless the user has set the allocator, let its segments on a GPU grow: sizes that a step asks for differ by
    micro-batch, bucket and chunk, and fixed segments would leave gaps that fit none of them. It is read when the first
    tensor is placed on the GPU. (Not run on one by the project.)"""
    if sys.platform == "linux" and not any(variable in os.environ for variable in ALLOCATOR_SETTINGS):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def quiet_libraries() -> None:
    """Keep back what libraries say that a user of a recipe can do nothing about: progress bars of downloads, hints on
    arguments that this program chose."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")


def refuse_unkept_settings() -> None:
    """Raises InputError for settings of an Accelerate config that this program would go against or pass over in
    silence. `accelerate launch` hands them down in the environment."""
    problems = []
    if asks_for("ACCELERATE_USE_DEEPSPEED"):
        problems.append(
            "DeepSpeed is not supported: its engine takes the optimizer step inside backward, so neither the check "
            "for finite numbers nor a repeated step could hold; use FSDP2 (accelerate_configs/fsdp2.yaml)"
        )
    for variable, name in UNSUPPORTED.items():
        if asks_for(variable):
            problems.append(f"{name} is not supported; take a file of accelerate_configs/")
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        problems.append(
            f"dynamo_backend {dynamo} stands beside the recipe's torch_compile, which decides; set dynamo_backend: no"
        )
    starter = launcher()
    if starter and asks_for_restarts(starter.cmdline()) and "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        problems.append(
            "the launcher of one process passes over --max_restarts; the one of several keeps it, also for one: "
            "--config_file accelerate_configs/multi_gpu.yaml --num_processes 1 (on a CPU cpu_2proc.yaml)"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        problems.append(
            f"gradient_accumulation_steps {accumulation} stands beside the recipe's effective_batch_size, from which "
            "the number of micro-batches follows; remove it"
        )
    if problems:
        raise InputError("\n".join(f"accelerate config: {problem}" for problem in problems))


def asks_for_restarts(command: Sequence[str]) -> bool:
    """Whether a launcher was given --max_restarts, as `accelerate launch --max_restarts 3 run_clm_owt.py ...`."""
    options = itertools.takewhile(lambda word: not word.endswith(".py"), command)
    return any(word.replace("-", "_").startswith("__max_restarts") for word in options)


def asks_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def find_hardware(accelerator: Accelerator, processes: Processes) -> Hardware:
    """What this run computes on, the same on all processes. Collective."""
    device = accelerator.device
    names = {"cuda": lambda: torch.cuda.get_device_name(device), "mps": mac_name}
    return Hardware(
        device_type=device.type,
        device_name=processes.gather(names.get(device.type, cpu_name)())[0],
        memory=min(processes.gather(total_memory(device))),
        processes=processes.count,
        mixed_precision=accelerator.mixed_precision,
        sharded=processes.sharded,
    )
