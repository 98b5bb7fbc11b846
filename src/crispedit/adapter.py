"""A change of a model as a LoRA adapter: what servers can load beside a base model, and what that costs.

    ΔW ≈ B A,   B = U_r √S_r  (d_out × r),   A = √S_r V_rᵀ  (r × d_in)

with ΔW = U S Vᵀ. No other matrices of rank r come closer to ΔW (Eckart and Young 1936). A change that was trained in
the matrices themselves has nearly full rank, so an adapter is an approximation: what is lost has to be measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .artifacts import write_json, write_tensors
from .errors import ConfigError
from .models import EditMatrix

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """B A in place of a ΔW.

    Args:
        B: (d_out, r), float32.
        A: (r, d_in), float32.
        energy: ‖B A‖² / ‖ΔW‖², 0 to 1.
    """

    B: Tensor
    A: Tensor
    energy: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A)


def low_rank(delta: Tensor, *, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of a change by a product of two thin matrices.

    Args:
        delta: ΔW, (d_out, d_in).
        rank: r, at most; or
        energy: the share of ‖ΔW‖² that it must hold, by the smallest r that does.

    Returns:
        The product.

    Raises:
        ConfigError: Neither or both are given, or one has a value that cannot be used.
    """
    if (rank is None) == (energy is None):
        raise ConfigError("give a rank or an energy")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank is {rank}; it must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"the energy is {energy:g}; it must be above 0 and at most 1")
    u, s, vt = torch.linalg.svd(delta.float(), full_matrices=False)
    held = s.double().square().cumsum(0)
    total = float(held[-1])
    if rank is None:
        assert energy is not None
        rank = int((held < energy * total * (1 - 1e-12)).sum()) + 1
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    share = float(held[rank - 1]) / total if total else 1.0
    return LowRank(B=u[:, :rank] * root, A=root[:, None] * vt[:rank], energy=min(1.0, share))


def write_adapter(
    products: Mapping[str, LowRank], matrices: Sequence[EditMatrix], base: str, building: Path, dtype: torch.dtype
) -> None:
    """Writes an adapter in the format of PEFT, which vLLM and others read.

    Args:
        products: By name of the matrix.
        matrices: The matrices, for where and how they are in the model.
        base: The base model, as its users name it.
        building: An existing directory.
        dtype: In which A and B are stored.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, LowRank] = {}
    for matrix in matrices:
        if matrix.name in products:
            module, product = matrix.name.removesuffix(".weight"), products[matrix.name]
            modules[module] = product
            tensors[f"base_model.model.{module}.lora_A.weight"] = product.A.to("cpu", dtype).contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = product.B.to("cpu", dtype).contiguous()
    largest = max(product.rank for product in modules.values())
    others = {name: product.rank for name, product in modules.items() if product.rank != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,  # B A is added as it is
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "fan_in_fan_out": any(isinstance(matrix.module, Conv1D) for matrix in matrices),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_tensors(building / WEIGHTS, tensors, {"format": "pt"}, "the adapter")
    write_json(building / CONFIG, config)


def serving_line(base: str, directory: Path, rank: int) -> str:
    """The command that serves the base model with the adapter (vLLM takes ranks that are powers of two from 8 on)."""
    largest = max(8, 2 ** math.ceil(math.log2(rank)))
    return f"vllm serve {base} --enable-lora --max-lora-rank {largest} --lora-modules edited={directory}"
