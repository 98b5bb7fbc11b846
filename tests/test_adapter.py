"""Adapters: the best approximation of its rank, and what PEFT reads is what was meant."""

import pytest
import torch

from crispedit.adapter import low_rank, serving_line, write_adapter
from crispedit.errors import ConfigError
from crispedit.models import edit_matrices
from families import tiny_model


def change(spectrum, d_out=20, d_in=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(spectrum), generator=generator))[0] for n in (d_out, d_in))
    return u @ torch.diag(torch.tensor(spectrum)) @ v.T


def test_it_is_the_best_of_its_rank():
    """What is left out is the root of the squares of the other singular values (Eckart and Young); float32."""
    spectrum = [4.0, 3.0, 2.0, 1.0, 0.5]
    delta = change(spectrum)
    total = sum(s * s for s in spectrum)
    for rank in range(1, 6):
        found = low_rank(delta, rank=rank)
        left = sum(s * s for s in spectrum[rank:])
        assert found.rank == rank
        assert float((delta - found.B @ found.A).norm()) == pytest.approx(left**0.5, abs=1e-5)
        assert found.energy == pytest.approx(1 - left / total, abs=1e-6)


def test_the_smallest_rank_that_holds_the_energy():
    delta = change([4.0, 3.0, 2.0, 1.0, 0.5])  # 30.25 in all: 16, 25, 29, 30
    assert [low_rank(delta, energy=e).rank for e in (0.5, 0.55, 0.82, 0.9, 0.99)] == [1, 2, 2, 3, 4]


def test_more_than_there_is_changes_nothing():
    found = low_rank(change([1.0, 2.0], 4, 5), rank=100)
    assert found.rank == 4
    assert found.energy == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "give a rank or an energy"),
        ({"rank": 0}, "the rank is 0"),
        ({"energy": 0.0}, "the energy is 0"),
        ({"energy": 1.1}, "the energy is 1.1"),
    ],
)
def test_what_cannot_be_used_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        low_rank(torch.eye(3), **options)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_what_was_meant(family, tmp_path):
    """W₀ + B A, of ranks that differ between matrices; the logits agree to float32's rounding."""
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    matrices = edit_matrices(model, [1, 2])
    products = {m.name: low_rank(change([3.0, 2.0, 1.0], *m.shape, seed=n), rank=2 + n) for n, m in enumerate(matrices)}
    model.save_pretrained(tmp_path / "base")
    write_adapter(products, matrices, str(tmp_path / "base"), tmp_path, torch.float32)
    ids = torch.arange(12)[None] + 3
    base = tiny_model(family)
    with torch.no_grad():
        for matrix in matrices:
            matrix.weight.add_(products[matrix.name].B @ products[matrix.name].A)
        wanted = model.eval()(ids).logits
        read = peft.PeftModel.from_pretrained(base.eval(), tmp_path)
        assert torch.allclose(read(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tiny_model(family).eval()(ids).logits, wanted, rtol=1e-2, atol=1e-2)


def test_the_line_that_serves_it(tmp_path):
    assert serving_line("a/b", tmp_path, 3).startswith("vllm serve a/b --enable-lora --max-lora-rank 8 ")
    assert "--max-lora-rank 64" in serving_line("a/b", tmp_path, 33)
