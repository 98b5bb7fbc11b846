"""Shared by all tests: no network, a cache of their own, the bundled model loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the program does
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from crispedit.models import LoadedModel, load_model

torch.cpu._is_amx_tile_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
"""Steps are float32 on every CPU, so that tolerances hold on every CPU; tests of mixed precision ask for it."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRISPEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundled() -> LoadedModel:
    """The bundled model, fresh: a test may edit it."""
    return load_model("bundled")
