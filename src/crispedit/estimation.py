"""The curvature of a model on token batches, estimated in one pass: K-FAC's factors, and EK-FAC's second moments.

A pass goes on where it was interrupted, with the same result bit for bit. Several processes share the batches.
(CrispEdit, arXiv 2602.15823, section 3.3 and Algorithm 1.)
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distributed, ranks
from .factors import Factors, FactorSums, factors_of
from .fisher import Fisher, passes
from .models import EditMatrix
from .moments import Kind
from .pass_state import PassState, own_state
from .progress import Progress, log, no_progress
from .spectrum import Spectrum
from .texts import TokenBatch

SAVE_SECONDS, SAVE_TIMES = 30.0, 20
"""A pass with a file saves its state after so many seconds; and after so many times what the last save took."""


def estimate_factors(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    kind: Kind = "dense",
    resume: Path | None = None,
    key: str = "",
    every: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Factors]:
    """The factors of token batches: :func:`sum_factors`, added up over all processes and divided.

    Args:
        model: See :func:`sum_factors`, like all others.
        matrices: See there.
        batches: See there.
        fisher: See there.
        seed: See there.
        kind: See there.
        resume: See there.
        key: See there.
        every: See there.
        progress: See there.

    Returns:
        Factors by matrix name, on the matrices' devices.

    Raises:
        NumericsError: An activation or a gradient is not finite.
    """
    options: dict[str, Any] = {"resume": resume, "key": key, "every": every, "progress": progress}
    sums = sum_factors(model, matrices, batches, fisher=fisher, seed=seed, kind=kind, **options)
    return {name: factors_of(name, sums.pop(name)) for name in list(sums)}


def sum_factors(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    kind: Kind = "dense",
    resume: Path | None = None,
    key: str = "",
    every: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, FactorSums]:
    """One pass over token batches: forward, backward to the matrices' outputs, two outer products each.

    Padding under the mask and every row's last token, which predicts nothing, are left out, so the
    factors do not depend on how rows were put together. Only the outputs of the matrices are
    differentiated; no parameter gets a gradient.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: Right-padded token rows.
        fisher: Labels sampled from the model (``mc``) or the texts' own (``empirical``).
        seed: Of the sampled labels.
        kind: ``dense`` factors, or a ``sketch`` of each.
        resume: A file for the state of the pass. If it holds that of the same pass, the pass goes on from there,
            and ends with the same factors bit for bit as one that was never interrupted (same machine, same number
            of threads). Whoever called removes it.
        key: Says which pass it is: everything that its result depends on.
        every: Seconds between saves, :data:`SAVE_SECONDS` when omitted; infinity saves the end only.
        progress: Called after every batch.

    Returns:
        Sums by matrix name, on the matrices' devices: of several processes, over this one's share of the batches.

    Raises:
        ArtifactError: The state cannot be written.
        KeyboardInterrupt: As it came, after the state was saved.
        NumericsError: An activation or a gradient is not finite.
    """
    state, total = PassState(matrices, kind), len(distributed.share(batches))
    if resume is not None and ranks.size() > 1:  # its own state: with other processes it would be of other batches
        resume, key = own_state(resume), f"{key} {ranks.rank()} of {ranks.size()}"
    restored = resume is not None and state.restore(resume, key)
    finished = restored and state.done == total
    if restored and not finished:
        log.info("an interrupted pass goes on after batch %d of %d", state.done, total)
    every = SAVE_SECONDS if every is None else every
    saved, pause = time.monotonic(), every
    try:
        for predicted, found in passes(model, matrices, batches, fisher, seed, state.done):
            state.add(predicted, found)
            progress("curvature", state.done, total)
            if resume is not None and state.done < total and time.monotonic() - saved >= pause:
                started = time.monotonic()
                state.try_to_save(resume, key)
                saved = time.monotonic()
                pause = max(every, SAVE_TIMES * (saved - started))
    except KeyboardInterrupt:
        if resume is not None and state.whole and every < math.inf and state.try_to_save(resume, key):
            log.info("interrupted after batch %d of %d; the same command goes on from there", state.done, total)
        raise
    if resume is not None and not finished:
        state.save(resume, key)
    return state.sums


def estimate_second_moments(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    spectra: Mapping[str, Spectrum],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information in the Kronecker eigenbasis, measured: EK-FAC (George et al. 2018).

    ∇W is the gradient of one sequence's loss, summed over its tokens, so that what tokens of a sequence have in
    common counts, which K-FAC leaves out.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: Right-padded token rows.
        spectra: By matrix name; complete.
        fisher: See :func:`estimate_factors`, like the next two.
        seed: See there.
        progress: See there.

    Returns:
        By matrix name, (d_out, d_in) float32: E[(U_Gᵀ ∇W U_A)²_ij], divided by tokens as the factors are.
    """
    bases = {m.name: spectra[m.name].to(m.parameter.device) for m in matrices}
    sums = {m.name: torch.zeros(m.shape, device=m.parameter.device) for m in matrices}
    num_tokens = torch.tensor(0)
    for number, (predicted, found) in enumerate(passes(model, matrices, batches, fisher, seed)):
        num_tokens += int(predicted.sum())
        for name, (inputs, gradients) in found.items():
            counted = predicted.to(gradients.device)
            for row, of_row in enumerate(counted):
                a = inputs[row][of_row].float() @ bases[name].input_basis
                g = gradients[row][of_row].float() @ bases[name].output_basis
                sums[name] += (g.T @ a).square()
        progress("second moments", number + 1, len(distributed.share(batches)))
    distributed.sum_tensors([*sums.values(), num_tokens])
    return {name: total / num_tokens for name, total in sums.items()}
