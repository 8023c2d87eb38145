"""The devices people train on: memory, peak arithmetic, and where the numbers come from.

To add a device, add a line. `pattern` is searched in the name that the driver gives (`torch.cuda.get_device_name()`);
nothing is guessed for a device that is not here.
"""

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table itself needs no torch
    import torch

# Shares of the peak (MFU) that trainers of GPT-2 reach: 18 % a plain Hugging Face stack (oumi, A100), 30 % nanoGPT on
# eight A100, 40 % llm.c on H100, 50 % build-nanogpt on one A100, 60 % llm.c on A100. Estimated times give both ends.
MFU_RANGE = (0.2, 0.5)


@dataclass(frozen=True)
class Device:
    """`memory_gib` as the driver reports it, less than is printed on the box; `peak_tflops` of dense products that
    accumulate in float32, in the precision that this project trains in on that device."""

    key: str  # as scripts/estimate.py takes it
    name: str
    pattern: str
    memory_gib: float
    peak_tflops: float
    source: str
    mixed_precision: str = "bf16"

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def peak_flops(self) -> float:
        """FLOP/s."""
        return self.peak_tflops * 1e12


DEVICES = (
    Device(
        "rtx-3060", "RTX 3060 12 GB", r"RTX 3060$", 11.8, 25.6, "112 tensor cores x 128 FLOP x 1.78 GHz, as GA102's"
    ),
    Device("rtx-3090", "RTX 3090", r"RTX 3090$", 23.7, 71, "NVIDIA Ampere GA102 whitepaper"),
    Device("rtx-4090", "RTX 4090", r"RTX 4090$", 23.6, 165, "NVIDIA Ada GPU architecture whitepaper"),
    Device("rtx-5090", "RTX 5090", r"RTX 5090$", 31.4, 209.5, "NVIDIA RTX Blackwell whitepaper"),
    Device("a100-40gb", "A100 40 GB", r"A100-\w+-40GB", 39.4, 312, "NVIDIA A100 datasheet"),
    Device("a100-80gb", "A100 80 GB", r"A100.*80GB", 79.2, 312, "NVIDIA A100 datasheet"),
    Device("h100-pcie", "H100 PCIe", r"H100 PCIe", 79.2, 756, "NVIDIA H100 datasheet"),
    Device("h100", "H100 SXM", r"H100 80GB HBM3", 79.2, 989, "NVIDIA H100 datasheet"),
    Device("h200", "H200", r"\bH200$", 139.8, 989, "NVIDIA H200 datasheet"),
    Device("b200", "B200", r"\bB200$", 178.4, 2250, "NVIDIA HGX B200 datasheet: an eighth of half the sparse rate"),
    Device("l4", "L4", r"\bL4$", 22.0, 121, "NVIDIA L4 datasheet: half the sparse rate"),
    # Turing has no bf16, and this project does not train in fp16, which would need a loss scale.
    Device("t4", "T4", r"\bT4$", 14.6, 8.1, "NVIDIA T4 datasheet, float32", "no"),
    # The GPU of a Mac may use two thirds of the memory it shares; these are common sizes.
    Device("m1", "M1 16 GB", r"Apple M1$", 10.7, 2.6, "Apple, 10 November 2020, float32", "no"),
    Device("m1-max", "M1 Max 32 GB", r"Apple M1 Max$", 21.3, 10.4, "Apple, 18 October 2021, float32", "no"),
    Device("m2", "M2 24 GB", r"Apple M2$", 16.0, 3.6, "Apple, 6 June 2022, float32", "no"),
)


def find_device(name: str | None) -> Device | None:
    """The known device of that key, or of a driver's name for it; None where there is none."""
    return next((d for d in DEVICES if name and (d.key == name.lower() or re.search(d.pattern, name))), None)


def name_of(device: "torch.device") -> str | None:
    """What the driver calls it; None for a CPU, of which nothing is known. (Not run by the project on GPU or Mac.)"""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None
