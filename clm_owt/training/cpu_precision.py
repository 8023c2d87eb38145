"""The precision in which a CPU is best asked to multiply.

python -m clm_owt.training.cpu_precision    prints the file of accelerate_configs/ for one process on this machine
"""

import sys

import torch


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bf16. Without them these take some 30 times as long as in
    float32, and with them a training step takes about half as long."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def main() -> None:
    name, why = ("cpu_bf16.yaml", "has") if multiplies_bf16() else ("cpu.yaml", "has no")
    print(f"Taking accelerate_configs/{name}: this processor {why} instructions for bf16", file=sys.stderr)
    print(f"accelerate_configs/{name}")


if __name__ == "__main__":
    main()
