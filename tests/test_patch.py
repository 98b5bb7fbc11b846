"""Patches: put on, taken off and stacked bit for bit, whatever the bits are; damaged and foreign ones are refused."""

import functools
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from crispedit.errors import ArtifactError, ModelError
from crispedit.patch import Patch, StoredTensors, apply_to, read_manifest
from families import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_bits(shape, dtype, generator):
    """Any bit patterns at all: subnormal numbers, both zeros, infinities and NaNs among them."""
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integer).view(dtype)


def raw(tensors):
    return {name: tensor.numpy().tobytes() for name, tensor in bits(tensors).items()}


def bits(tensors):
    return {name: t.view(torch.int16 if t.element_size() == 2 else torch.int32) for name, t in tensors.items()}


def some_model(dtype, generator):
    shapes = {"a": (3, 5), "b": (2, 4), "c": (7,), "d": ()}
    return {name: random_bits(shape, dtype, generator) for name, shape in shapes.items()}


def patched(tensors, patch):
    return {**tensors, **patch.applied(tensors)}


@settings(max_examples=100, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    parts=st.lists(st.sets(st.sampled_from("abcd")), min_size=1),
)
def test_any_patches_on_and_off_again_give_the_same_bits(seed, dtype, parts):
    generator = torch.Generator().manual_seed(seed)
    models = [some_model(dtype, generator)]
    for names in parts:
        models.append({**models[-1], **{name: some_model(dtype, generator)[name] for name in names}})
    patches = [Patch.between(one, two, {}) for one, two in itertools.pairwise(models)]
    now = models[0]
    for patch, wanted in zip(patches, models[1:], strict=True):
        now = patched(now, patch)
        assert raw(now) == raw(wanted)
    for patch, wanted in zip(patches[::-1], models[-2::-1], strict=True):
        now = patched(now, patch.reversed())
        assert raw(now) == raw(wanted)
    stack = patches[0]
    for patch in patches[1:]:
        stack = stack.then(patch)
    assert raw(patched(models[0], stack)) == raw(models[-1])
    assert raw(patched(models[-1], stack.reversed())) == raw(models[0])
    assert set(stack.changes) == {name for name in "abcd" if raw(models[0])[name] != raw(models[-1])[name]}


SPECIAL = {
    torch.float32: (0x0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFD2345A, 0x7F800001, 0x1, 0x807FFFFF),
    torch.bfloat16: (0x0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFD2, 0x7F81, 0x1, 0x807F),
    torch.float16: (0x0, 0x8000, 0x7C00, 0xFC00, 0x7E01, 0xFF5A, 0x7C01, 0x1, 0x83FF),
}
"""Bits of both zeros, both infinities, quiet NaNs with a payload, a signalling one, and two subnormal numbers."""


def special_bits(shape, dtype, generator):
    """Every other entry is one of :data:`SPECIAL`."""
    found = random_bits(shape, dtype, generator)
    integers = bits({"x": found})["x"].view(-1)
    width = 8 * dtype.itemsize
    signed = torch.tensor([value - (value >> (width - 1) << width) for value in SPECIAL[dtype]]).to(integers.dtype)
    integers[::2] = signed[torch.randint(len(signed), integers[::2].shape, generator=generator)]
    return found


def test_the_special_values_are_what_they_are_said_to_be():
    for dtype, values in SPECIAL.items():
        width = 8 * dtype.itemsize
        integer = torch.int32 if width == 32 else torch.int16
        found = torch.tensor([v - (v >> (width - 1) << width) for v in values], dtype=integer).view(dtype).double()
        assert found[:2].tolist() == [0, 0]
        assert found[:2].signbit().tolist() == [False, True]
        assert found[2:4].tolist() == [math.inf, -math.inf]
        assert found[4:7].isnan().all()
        assert (found[7:].abs() < torch.finfo(dtype).smallest_normal).all()
        assert (found[7:] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_patches_of_special_values_are_joined_in_any_way(dtype, tmp_path):
    """Put on one by one and taken off; any run of them as one patch, however it was joined; and never out of order."""
    generator = torch.Generator().manual_seed(3)
    chosen = random.Random(3)
    shapes = {"a": (3, 5), "b": (2, 4), "c": (7,), "d": (1,)}
    models = [{name: special_bits(shape, dtype, generator) for name, shape in shapes.items()}]
    for _ in range(100):
        names = chosen.sample(sorted(shapes), chosen.randint(1, len(shapes)))
        models.append({**models[-1], **{name: special_bits(shapes[name], dtype, generator) for name in names}})
    contents = [raw(model) for model in models]
    patches = [Patch.between(one, two, {}) for one, two in itertools.pairwise(models)]
    for number in range(0, 100, 10):
        patches[number].write(tmp_path / "patch.safetensors")
        patches[number] = Patch.read(tmp_path / "patch.safetensors")
    now = models[0]
    for number, patch in enumerate(patches, 1):
        now = patched(now, patch)
        assert raw(now) == contents[number]
    for number, patch in reversed(list(enumerate(patches))):
        now = patched(now, patch.reversed())
        assert raw(now) == contents[number]
    for _ in range(30):
        first, middle, last = sorted(chosen.sample(range(101), 3))
        one, two = (functools.reduce(Patch.then, patches[a:b]) for a, b in ((first, middle), (middle, last)))
        both = one.then(two)
        assert raw(patched(models[first], both)) == contents[last]
        assert raw(patched(models[last], both.reversed())) == contents[first]
        assert raw(both.changes) == raw(functools.reduce(Patch.then, patches[first:last]).changes)
        with pytest.raises(ModelError):
            two.then(one)
        with pytest.raises(ModelError):
            two.applied(models[first])
    assert [raw(model) for model in models] == contents  # nothing was changed in place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_memory_is_as_it_was_after_a_hundred_patches(family, dtype):
    """Stored in one dtype, computed with in float32, as a CPU does with float16."""
    model = tiny_model(family).to(dtype).float()
    generator = torch.Generator().manual_seed(0)
    original = raw(StoredTensors(model, dtype))
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    patches = []
    for number in range(100):
        before = StoredTensors(model, dtype)
        name = names[number % len(names)]
        step = torch.randn(before[name].shape, generator=generator) / 100
        after = {**before, name: (before[name].float() + step).to(dtype)}
        patches.append(Patch.between(before, after, {}))
        apply_to(model, patches[-1], dtype)
        assert raw(StoredTensors(model, dtype)) == raw(after)
    for patch in reversed(patches):
        apply_to(model, patch.reversed(), dtype)
    assert raw(StoredTensors(model, dtype)) == original


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    before = {name: torch.randn(4, 6, generator=generator).bfloat16() for name in "abc"}
    return before, {**before, "b": before["b"] + 1}


def test_a_file_gives_the_same_patch(pair, tmp_path):
    before, after = pair
    Patch.between(before, after, {"model": "some/model", "edits": 3}).write(tmp_path / "one.safetensors")
    read = Patch.read(tmp_path / "one.safetensors")
    assert raw(patched(before, read)) == raw(after)
    assert read.about == {"model": "some/model", "edits": 3}
    assert read.dtypes == {"b": "bfloat16"}
    assert read.num_bytes == 4 * 6 * 2  # two bytes a weight, and only the tensor that changed
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_a_patch_is_refused_for_what_it_is_not_for(pair):
    before, after = pair
    patch = Patch.between(before, after, {"model": "some/model"})
    with pytest.raises(ModelError, match=r"^nothing to do: the model is already as this patch would make it$"):
        patch.applied(after)
    other = {**before, "a": before["a"] + 1}
    with pytest.raises(ModelError, match=r"^the patch is for another model: a differs; it is a patch for some/model"):
        patch.applied(other)
    with pytest.raises(ModelError, match=r"^the patch is for another model: a and 2 more differ"):
        patch.applied({name: tensor * 2 for name, tensor in before.items()})
    with pytest.raises(ModelError, match="a and 1 more differ"):
        patch.applied({"b": before["b"]})
    with pytest.raises(ModelError, match="d differs"):
        patch.applied({**before, "d": before["a"]})
    with pytest.raises(ModelError, match="nothing to do"):
        patch.then(patch)
    with pytest.raises(ModelError, match="for another model: b differs"):
        patch.then(Patch.between({**before, "b": before["b"] * 2}, before, {}))


def test_one_bit_of_a_changed_tensor_counts_where_the_fingerprint_does_not_look():
    before = {"a": torch.zeros(50, 50)}
    patch = Patch.between(before, {"a": torch.ones(50, 50)}, {})
    other = {"a": before["a"].clone()}
    other["a"].view(-1)[1] = -0.0  # 2500 values: every second one is in the fingerprint
    assert torch.equal(other["a"], before["a"])
    with pytest.raises(ModelError, match="a differs"):
        patch.applied(other)


def test_models_that_no_patch_can_join_are_named(pair):
    before, after = pair
    for changed, said in (
        ({**after, "b": after["b"].float()}, r"of b one has torch.bfloat16 \(4, 6\), the other torch.float32 \(4, 6\)"),
        ({**after, "b": after["b"][:2]}, r"of b one has torch.bfloat16 \(4, 6\), the other torch.bfloat16 \(2, 6\)"),
        ({"a": after["a"], "b": after["b"]}, r"of c one has torch.bfloat16 \(4, 6\), the other none"),
    ):
        with pytest.raises(ModelError, match=said):
            Patch.between(before, changed, {})


def test_every_flipped_bit_and_every_missing_byte_is_found(pair, tmp_path):
    before, after = pair
    path = tmp_path / "one.safetensors"
    Patch.between(before, after, {}).write(path)
    good = path.read_bytes()
    start = len(good) - 4 * 6 * 2
    for byte in range(start, len(good)):
        path.write_bytes(good[:byte] + bytes([good[byte] ^ 4]) + good[byte + 1 :])
        with pytest.raises(ArtifactError, match=r"one.safetensors' is damaged: the checksum of b is another"):
            Patch.read(path)
    for size in (0, 7, start - 1, start, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ArtifactError, match=r"one.safetensors' is damaged"):
            Patch.read(path)


def test_what_is_no_patch_is_named(pair, tmp_path):
    before, after = pair
    path = tmp_path / "one.safetensors"
    with pytest.raises(ArtifactError, match="there is no patch"):
        Patch.read(path)
    Patch.between(before, after, {}).write(path)
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["crispedit_patch"])
    assert manifest == read_manifest(path)
    from safetensors.torch import save_file

    save_file({"b": before["b"]}, path)
    with pytest.raises(ArtifactError, match="is no patch of crispedit"):
        Patch.read(path)
    save_file({"b": before["b"]}, path, metadata={"crispedit_patch": json.dumps({**manifest, "format": 2})})
    with pytest.raises(ArtifactError, match="has format 2, and this version reads 1"):
        Patch.read(path)
