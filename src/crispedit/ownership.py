"""Which process trains which of the edited matrices.

Its owner alone has a matrix's float32 master (what it was, and the parameter that its change stands for), its rule and
the moments of its optimizer; every process has a copy that the model runs with. Gradients are summed at the owner, and
the new weights come from there: together that is what summing gradients everywhere moves, and all have the same bits.
"""

from collections.abc import Sequence

from torch import Tensor

from . import distributed, ranks
from .models import EditMatrix


def _owners(matrices: Sequence[EditMatrix]) -> list[int]:
    """The rank of each matrix's owner, by their numbers of entries; inside :func:`crispedit.ranks.sharing`."""
    return distributed.owners([matrix.parameter.numel() for matrix in matrices])


def owned(matrices: Sequence[EditMatrix]) -> list[bool]:
    """Which matrices this process trains; on one process all of them.

    Args:
        matrices: What is edited, the same on every process.

    Returns:
        One for each.
    """
    with ranks.sharing():
        return [owner == ranks.rank() for owner in _owners(matrices)]


def sum_at_owners(matrices: Sequence[EditMatrix], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Sums gradients over all processes.

    Args:
        matrices: What is edited.
        gradients: In each of them, in its parameter's layout.

    Returns:
        For matrices that this process owns their sums; the others are of no use any more. What was given may be
        overwritten.
    """
    with ranks.sharing():
        if ranks.size() == 1:
            return list(gradients)
        found = [gradient.contiguous() for gradient in gradients]
        distributed.sum_tensors(found, _owners(matrices))
        return found


def weights_of_owners(matrices: Sequence[EditMatrix]) -> None:
    """Gives every process the matrices as their owners have them, bit for bit.

    Args:
        matrices: What is edited; their parameters are overwritten where others own them.
    """
    with ranks.sharing():
        distributed.broadcast_tensors([matrix.parameter.data for matrix in matrices], _owners(matrices))


def sum_of_all(value: Tensor) -> Tensor:
    """The sum over all processes of what each has of its own matrices.

    Args:
        value: A scalar; it may be overwritten.

    Returns:
        The same everywhere.
    """
    with ranks.sharing():
        distributed.sum_tensors([value])
    return value
