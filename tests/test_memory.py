"""What memory a process takes, and gives back."""

import ctypes
import sys

import pytest
import torch

from crispedit.memory import give_back, resident_bytes


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_what_malloc_keeps_of_what_was_freed_is_given_back():
    """400 MB in small pieces, of which some stay: the heap cannot shrink by itself."""
    pieces = [torch.ones(2**14) for _ in range(6000)]
    kept = pieces[::100]
    del pieces
    before = resident_bytes()
    give_back()
    assert resident_bytes() < before - 250_000_000
    assert len(kept) == 60


def test_where_malloc_cannot_nothing_happens(monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", asked.append)
    give_back()
    assert not asked
