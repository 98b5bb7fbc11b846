"""curvlinops' exact curvatures beside ours: an independent implementation, asked wherever it is installed.

Our dense matrices come from one product of thin ones (:mod:`.layer`); curvlinops applies the same curvatures to vectors
by automatic differentiation through the network. A few random products tell them apart.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from .layer import LayerCurvature

PRODUCTS = 2


def against_curvlinops(layer: LayerCurvature, matrix: Tensor, kind: Literal["hessian", "gnh"]) -> float | None:
    """‖M v − M' v‖ / ‖M' v‖ for random v, M' being curvlinops'.

    Args:
        layer: Of which M is the curvature.
        matrix: M, (n, n) float64, n = d_out d_in, row-major.
        kind: Which operator M' is.

    Returns:
        The relative difference; ``None`` without curvlinops.
    """
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError:
        return None
    d_out, d_in = layer.shape
    linear = nn.Linear(d_in, d_out, dtype=torch.float64)
    linear.weight.data, linear.bias.data = layer.weight.clone(), layer.bias.clone()
    operator = (HessianLinearOperator if kind == "hessian" else GGNLinearOperator)(
        nn.Sequential(linear, layer.above),
        nn.CrossEntropyLoss(),
        [linear.weight],
        [(layer.inputs, layer.labels)],
        check_deterministic=False,
    )
    v = torch.randn(d_out * d_in, PRODUCTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = operator @ v
    return float((matrix @ v - theirs).norm() / theirs.norm())
