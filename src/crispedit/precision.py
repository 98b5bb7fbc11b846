"""Numbers of an edit: float32 masters of what is edited, and steps in bfloat16 where the hardware has it.

(CrispEdit, arXiv 2602.15823, trains in the model's dtype; small steps would be lost in it.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from .errors import check_choice
from .hardware import multiplies_bfloat16
from .models import EditMatrix

Precision = Literal["auto", "float32", "bfloat16"]


@contextmanager
def float32_masters(matrices: Sequence[EditMatrix]) -> Iterator[None]:
    """Within, the matrices are float32 parameters that require a gradient; the model around them keeps its dtype.

    Afterwards they are rounded to the dtype they had, and nothing requires a gradient that did not.
    """
    before = [(m, m.parameter.dtype, m.parameter.requires_grad) for m in matrices]
    handles = []
    for matrix, dtype, _ in before:
        matrix.module.weight = nn.Parameter(matrix.parameter.data.float())
        if dtype != torch.float32:
            handles += _casting(matrix.module, dtype)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for matrix, dtype, needed in before:
            matrix.module.weight = nn.Parameter(matrix.parameter.data.to(dtype), requires_grad=needed)


def _casting(module: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Hooks that hand a module float32 inputs and give its outputs back in ``dtype``."""
    bias = module.bias
    if bias is not None:
        bias.data = bias.data.float()

    class _RestoreBias:
        def remove(self) -> None:
            if bias is not None:
                bias.data = bias.data.to(dtype)

    return [
        module.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(), *arguments[1:])),
        module.register_forward_hook(lambda _, __, output: output.to(dtype)),
        _RestoreBias(),
    ]


def mixed_precision(precision: Precision, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a step computes in bfloat16 around the float32 masters.

    Args:
        precision: ``bfloat16``, ``float32`` (the model's own dtype, that is), or ``auto``: bfloat16 where the
            hardware multiplies such matrices faster (:func:`crispedit.hardware.multiplies_bfloat16`); never for a
            float16 model.
        dtype: The model's.
        device: That it is on.

    Returns:
        Whether it does.

    Raises:
        ConfigError: ``precision`` is none of these.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision != "auto" or dtype == torch.float16:
        return precision == "bfloat16"
    return multiplies_bfloat16(device)
