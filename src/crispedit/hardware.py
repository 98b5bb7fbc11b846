"""Which numbers the processor at hand multiplies fast."""

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones.

    Args:
        device: One that is here.

    Returns:
        True for a GPU from Ampere on, and for a CPU with AMX or AVX-512's bfloat16 products.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def emulates_bfloat16() -> bool:
    """Whether the CPU has no way of its own to multiply bfloat16 matrices, and takes many times as long as in float32.

    On one without AVX-512 a product of 512 × 1024 × 1024 ran at 4.4 GFLOP/s in bfloat16, and at 35 in float32.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (there and torch.ops.mkldnn._is_mkldnn_bf16_supported())
