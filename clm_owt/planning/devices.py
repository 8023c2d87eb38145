"""What a run computes on (`Hardware`), and the devices people train on: memory, peak arithmetic, and their sources.

To add a device, add a line. `pattern` is searched in the name that the driver gives (`torch.cuda.get_device_name()`);
nothing is guessed for a device that is not here.
"""

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """`memory_gib` as the driver reports it, less than is printed on the box; `peak_tflops` of dense products that
    accumulate in float32, in the precision that this project trains in on that device; `memory_gbs` GB/s of its
    memory; `link_gbs` GB/s to others in the machine and, at once, back: NVLink's, else PCIe's. `source` is of the
    peak; the other rates are from the same datasheets."""

    key: str  # as scripts/estimate.py takes it
    name: str
    pattern: str
    memory_gib: float
    peak_tflops: float
    memory_gbs: float
    link_gbs: float
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

    @property
    def memory_rate(self) -> float:
        """Bytes a second."""
        return self.memory_gbs * 1e9

    @property
    def link_rate(self) -> float:
        """Bytes a second, in each direction."""
        return self.link_gbs * 1e9

    def hardware(self, processes: int = 1) -> "Hardware":
        """So many of this device, as a run would find them."""
        device_type = "mps" if self.pattern.startswith("Apple") else "cuda"
        return Hardware(device_type, self.name, self.memory, processes, self.mixed_precision)


DEVICES = (
    Device(
        "rtx-3060",
        "RTX 3060 12 GB",
        r"RTX 3060$",
        11.8,
        25.6,
        360,
        32,
        "112 tensor cores x 128 FLOP x 1.78 GHz, as GA102's",
    ),
    Device("rtx-3090", "RTX 3090", r"RTX 3090$", 23.7, 71, 936, 32, "NVIDIA Ampere GA102 whitepaper"),
    Device("rtx-4090", "RTX 4090", r"RTX 4090$", 23.6, 165, 1008, 32, "NVIDIA Ada GPU architecture whitepaper"),
    Device("rtx-5090", "RTX 5090", r"RTX 5090$", 31.4, 209.5, 1792, 64, "NVIDIA RTX Blackwell whitepaper"),
    Device("a100-40gb", "A100 40 GB", r"A100-\w+-40GB", 39.4, 312, 1555, 300, "NVIDIA A100 datasheet"),
    Device("a100-80gb", "A100 80 GB", r"A100.*80GB", 79.2, 312, 2039, 300, "NVIDIA A100 datasheet"),
    Device("h100-pcie", "H100 PCIe", r"H100 PCIe", 79.2, 756, 2000, 64, "NVIDIA H100 datasheet"),
    Device("h100", "H100 SXM", r"H100 80GB HBM3", 79.2, 989, 3350, 450, "NVIDIA H100 datasheet"),
    Device("h200", "H200", r"\bH200$", 139.8, 989, 4800, 450, "NVIDIA H200 datasheet"),
    Device(
        "b200",
        "B200",
        r"\bB200$",
        178.4,
        2250,
        8000,
        900,
        "NVIDIA HGX B200 datasheet: an eighth of half the sparse rate",
    ),
    Device("l4", "L4", r"\bL4$", 22.0, 121, 300, 32, "NVIDIA L4 datasheet: half the sparse rate"),
    # Turing and Volta have no bf16.
    Device("t4", "T4", r"\bT4$", 14.6, 65, 320, 16, "NVIDIA T4 datasheet, float16", "fp16"),
    Device("v100", "V100 16 GB", r"V100-SXM\d-16GB", 15.8, 125, 900, 150, "NVIDIA V100 datasheet, float16", "fp16"),
    Device(
        "v100-32gb", "V100 32 GB", r"V100-SXM\d-32GB", 31.7, 125, 900, 150, "NVIDIA V100 datasheet, float16", "fp16"
    ),
    # The GPU of a Mac may use two thirds of the memory it shares; these are common sizes.
    Device("m1", "M1 16 GB", r"Apple M1$", 10.7, 2.6, 68, 68, "Apple, 10 November 2020, float32", "no"),
    Device("m1-max", "M1 Max 32 GB", r"Apple M1 Max$", 21.3, 10.4, 400, 400, "Apple, 18 October 2021, float32", "no"),
    Device("m2", "M2 24 GB", r"Apple M2$", 16.0, 3.6, 100, 100, "Apple, 6 June 2022, float32", "no"),
)


def find_device(name: str | None) -> Device | None:
    """The known device of that key or name, or of a driver's name for it; None where there is none."""
    return next(
        (d for d in DEVICES if name and (name.lower() in (d.key, d.name.lower()) or re.search(d.pattern, name))), None
    )


@dataclass(frozen=True)
class Hardware:
    """What a run computes on, the same for each of its processes. It is made once, when the processes have started.

    device_type: `cpu`, `cuda` or `mps`; device_name: as the driver gives it; memory: bytes of the smallest device, on
    a CPU what cgroup and `ulimit` allow; mixed_precision: Accelerate's `no`, `bf16`, `fp16`, `fp8`; sharded: by FSDP2.
    """

    device_type: str = "cpu"
    device_name: str | None = None
    memory: int = 0
    processes: int = 1
    mixed_precision: str = "no"
    sharded: bool = False

    def __str__(self) -> str:
        return f"{self.device_type} ({self.device_name})"

    @property
    def device(self) -> Device | None:
        """The accelerator as this module knows it; None for another one, and for a CPU."""
        return None if self.device_type == "cpu" else find_device(self.device_name)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of one device, where it is known."""
        return self.device and self.device.peak_flops

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the matrix products' inputs and the activations that are kept for the backward."""
        return 4 if self.mixed_precision == "no" else 2


def cpu_name() -> str:
    """The processor's name, as Linux gives it, or its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def mac_name() -> str | None:
    """The chip of a Mac, whose GPU has no name of its own. (Not run by the project on a Mac.)"""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
