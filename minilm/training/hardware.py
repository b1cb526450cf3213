"""What the hardware could do at most, so that a speed can be called a share of it."""

from __future__ import annotations

import torch

# Dense bfloat16 matrix products with float32 accumulation, in FLOP/s, without sparsity, by the device's own name.
# Sources: NVIDIA's data sheets (A100, A10, H100, H200, L4, L40S) and architecture white papers (GA102, Ada, Blackwell).
_PEAK_BF16_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4080": 97.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """Peak FLOP/s of one device in the precision of the run; None where it is not known: absent, not guessed."""
    if device.type != "cuda" or not bf16:
        return None
    return _PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))
