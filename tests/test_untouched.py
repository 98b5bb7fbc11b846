"""What foreign code does to a model or to the process is undone or noticed."""

import logging
import os
import random
import warnings

import numpy as np
import pytest
import torch

from crispedit.errors import CrispEditError
from crispedit.untouched import untouched_model, untouched_process
from families import tiny_model


def test_a_model_is_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with untouched_model(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert "tie_weights" not in vars(model)


def test_a_model_is_not_tied_again():
    model = tiny_model("llama", tie_word_embeddings=True)
    head = model.lm_head.weight = torch.nn.Parameter(-model.model.embed_tokens.weight.detach())
    with untouched_model(model):
        model.tie_weights()
    assert model.lm_head.weight is head
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def one_ulp(weight):
    weight.view(-1)[7] = torch.nextafter(weight.view(-1)[7], torch.tensor(torch.inf))


@pytest.mark.parametrize("change", [one_ulp, torch.Tensor.neg_], ids=["the last bit of one entry", "every sign"])
def test_a_changed_weight_is_named(change):
    model = tiny_model("llama")
    with (
        pytest.raises(CrispEditError, match=r"only to be measured: model.layers.2.mlp.down_proj.weight$"),
        untouched_model(model),
        torch.no_grad(),
    ):
        change(model.model.layers[2].mlp.down_proj.weight)


def test_a_replaced_weight_is_named_under_each_of_its_names():
    model = tiny_model("llama", tie_word_embeddings=True)
    message = r"measured: lm_head.weight$"
    with pytest.raises(CrispEditError, match=message), untouched_model(model):
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))


def test_an_error_is_not_hidden():
    model = tiny_model("llama")

    def interrupted():
        model.lm_head.weight.data.zero_()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), untouched_model(model):
        interrupted()
    assert "tie_weights" not in vars(model)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_the_process_is_as_it_was(monkeypatch, capsys):
    monkeypatch.setenv("KEPT", "a")
    monkeypatch.setenv("TAKEN", "b")
    logger, root = logging.getLogger("some_harness"), logging.getLogger()
    before, handlers = dict(os.environ), list(root.handlers)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    wanted = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    with untouched_process("some_harness"):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        drawn()
        os.environ.update(KEPT="c", NEW="d")
        del os.environ["TAKEN"]
        logger.addHandler(logging.StreamHandler())
        root.addHandler(logging.StreamHandler())
        logger.propagate = False
        root.setLevel(logging.DEBUG)
        warnings.warn("not ours", UserWarning, stacklevel=1)  # would be an error in these tests
        print("not a result")
    assert drawn() == wanted
    assert dict(os.environ) == before
    assert root.handlers == handlers
    assert (logger.level, logger.handlers, logger.propagate) == (logging.NOTSET, [], True)
    assert root.level == logging.WARNING
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "not a result" in captured.err
