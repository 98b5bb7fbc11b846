"""Capability drift against its definition, and the tasks' counting."""

import torch

from crispedit.capability import Logits, drift_of_texts, measure_drift
from crispedit.pieces import HiddenStates
from crispedit.texts import TokenBatch


def always(logits: torch.Tensor) -> Logits:
    return lambda _: HiddenStates.of_logits(logits)


def test_drift_is_the_mean_kl_and_the_bregman_divergence_of_the_loss():
    """KL(p₀ ‖ p) = LSE(z) − LSE(z₀) − ⟨softmax(z₀), z − z₀⟩ (design of CrispEdit, definition 1), padding left out."""
    torch.manual_seed(0)
    z0, z = torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    batch = TokenBatch(ids=torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    found = measure_drift(always(z0), always(z), [batch])
    positions = [(0, 0, 2), (0, 1, 3), (0, 2, 4), (1, 0, 6)]
    bregman = [
        z[r, t].logsumexp(0) - z0[r, t].logsumexp(0) - z0[r, t].softmax(0) @ (z[r, t] - z0[r, t])
        for r, t, _ in positions
    ]
    # measured on float32 log-probabilities
    torch.testing.assert_close(found.drift, float(sum(bregman) / 4), rtol=1e-5, atol=0)
    loss = -sum(z[r, t].log_softmax(0)[label] for r, t, label in positions) / 4
    torch.testing.assert_close(found.loss, float(loss), rtol=1e-5, atol=0)


def test_sums_are_kept_text_by_text():
    """One batch of two texts is two batches of one text each, padding left out."""
    torch.manual_seed(0)
    z0, z = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = drift_of_texts(always(z0), always(z), [TokenBatch(ids=ids, mask=mask)])
    assert found.tokens.tolist() == [3, 1]
    for text, length in enumerate((4, 2)):
        alone = TokenBatch(ids=ids[text : text + 1, :length], mask=mask[text : text + 1, :length])
        of_one = [logits[text : text + 1, :length] for logits in (z0, z)]
        means = measure_drift(*map(always, of_one), [alone])
        for name in ("drift", "loss", "loss_base"):
            torch.testing.assert_close(
                float(getattr(found, name)[text] / found.tokens[text]), getattr(means, name), rtol=1e-6, atol=0
            )


def test_a_model_does_not_drift_from_itself():
    z = torch.randn(1, 3, 5)
    batch = TokenBatch(ids=torch.tensor([[1, 2, 3]]), mask=torch.ones(1, 3, dtype=torch.int64))
    found = measure_drift(always(z), always(z), [batch])
    assert found.drift == 0
    assert found.loss == found.loss_base
