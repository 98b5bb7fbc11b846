"""Public models by name: against the numbers of parameters that are published with them."""

import pytest
import torch
import transformers

from crispedit.errors import ModelError
from crispedit.models import load_skeleton
from crispedit.shapes import SHAPES, shape_config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen-2.5-0.5B", 494_032_768),
        ("qwen-2.5-1.5b", 1_543_714_304),
        ("Llama-3-8B", 8_030_261_248),
        ("LLAMA-3-70B", 70_553_706_496),
        ("Llama-3-405B", 405_853_388_800),
    ],
)
def test_a_shape_has_the_parameters_of_the_model(name, parameters):
    loaded = load_skeleton(name, tokenizer=False)
    assert sum(p.numel() for p in loaded.model.parameters()) == parameters
    assert loaded.stored_dtype == torch.bfloat16
    assert loaded.tokenizer is None


def test_other_names_are_no_shapes():
    assert shape_config("meta-llama/Meta-Llama-3-8B") is None
    assert len(SHAPES) == 5


def test_a_shape_has_no_tokenizer():
    with pytest.raises(ModelError, match="leave EDITS out"):
        load_skeleton("Llama-3-8B")


def test_a_configuration_is_enough(tmp_path):
    transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    assert load_skeleton(str(tmp_path), tokenizer=False).model.config.hidden_size == 64
    with pytest.raises(ModelError, match="leave EDITS out"):
        load_skeleton(str(tmp_path))
