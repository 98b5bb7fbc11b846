"""The experiment's data: what is read, and that anything else is said in one line."""

import gzip
import os
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from crispedit.errors import ConfigError
from crispedit.experiments.images import digits, downloaded, from_directory, normalised, read_idx


def arrays(n: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {}
    for split, count in (("train", n), ("test", n // 2)):
        found[f"x_{split}"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        found[f"y_{split}"] = (np.arange(count) % 10).astype(np.uint8)
    return found


def write_npz(directory: Path, **changed: np.ndarray) -> None:
    np.savez(directory / "mnist.npz", **(arrays() | changed))
    np.savez(directory / "fashion_mnist.npz", **arrays(seed=1))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, found: dict[str, np.ndarray], *, gz: bool) -> None:
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for key, name in (("x", "images-idx3-ubyte"), ("y", "labels-idx1-ubyte")):
            data = idx(found[f"{key}_{split}"])
            path = folder / f"{prefix}-{name}{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(data) if gz else data)


def same(task, found: dict[str, np.ndarray]) -> bool:
    return all(
        np.array_equal(part.images[:, 0].numpy(), found[f"x_{split}"])
        and np.array_equal(part.labels.numpy(), found[f"y_{split}"])
        for split, part in (("train", task.train), ("test", task.test))
    )


def test_npz_and_idx_files_hold_the_same(tmp_path):
    write_npz(tmp_path)
    tasks = from_directory(tmp_path)
    assert same(tasks.capability, arrays())
    assert same(tasks.edit, arrays(seed=1))
    assert tasks.classes == 6
    other = tmp_path / "idx"
    write_idx(other / "MNIST" / "raw", arrays(), gz=True)
    write_idx(other / "fashion_mnist", arrays(seed=1), gz=False)
    tasks = from_directory(other)
    assert same(tasks.capability, arrays())
    assert same(tasks.edit, arrays(seed=1))


def test_digits_are_two_tasks_with_the_same_labels():
    tasks = digits()
    for task in (tasks.capability, tasks.edit):
        for part in (task.train, task.test):
            assert part.images.shape[1:] == (1, 28, 28)
            assert set(part.labels.tolist()) == {0, 1, 2, 3, 4}
    assert tasks.classes == 5
    assert sum(len(part) for task in (tasks.capability, tasks.edit) for part in (task.train, task.test)) == 1797
    scaled = normalised(tasks.edit.test.images)
    assert float(scaled.min()) == -1
    assert 0.9 < float(scaled.max()) <= 1


WRONG = {
    "no directory": (lambda d: None, "is no directory"),
    "nothing in it": (lambda d: d.mkdir(), "no mnist in"),
    "half of it": (lambda d: (d.mkdir(), np.savez(d / "mnist.npz", **arrays())), "no fashion_mnist in"),
    "no .npz file": (lambda d: (d.mkdir(), (d / "mnist.npz").write_bytes(b"text")), "is no .npz file"),
    "an array missing": (lambda d: (d.mkdir(), np.savez(d / "mnist.npz", x_train=np.zeros(3))), "has no array y_train"),
    "other sizes": (lambda d: (d.mkdir(), write_npz(d, x_train=np.zeros((6, 32, 32), np.uint8))), r"\(6, 32, 32\)"),
    "floats": (lambda d: (d.mkdir(), write_npz(d, x_train=np.zeros((6, 28, 28)))), "float64"),
    "labels missing": (lambda d: (d.mkdir(), write_npz(d, y_train=np.zeros(5, np.uint8))), r"labels \(5,\)"),
    "labels of others": (lambda d: (d.mkdir(), write_npz(d, y_test=np.full(3, 12, np.uint8))), "labels 12 to 12"),
    "no images": (
        lambda d: (d.mkdir(), write_npz(d, x_test=np.zeros((0, 28, 28), np.uint8), y_test=np.zeros(0, np.uint8))),
        r"\(0, 28, 28\)",
    ),
    "pickles": (lambda d: (d.mkdir(), write_npz(d, x_train=np.array([{}], dtype=object))), "is no .npz file"),
    "an idx file missing": (
        lambda d: (write_idx(d / "mnist", arrays(), gz=False), (d / "mnist" / "t10k-labels-idx1-ubyte").unlink()),
        "has no file t10k-labels",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_said(case, tmp_path):
    make, message = WRONG[case]
    make(tmp_path / "data")
    with pytest.raises(ConfigError, match=message) as raised:
        from_directory(tmp_path / "data")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no idx file"),
        (b"PNG!....", "no idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "no idx file"),  # floats
        (b"\0\0\x08\x03\0\0", "no idx file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "cut off"),
    ],
)
def test_broken_idx_files_are_said(data, message, tmp_path):
    (tmp_path / "file-ubyte").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_idx(tmp_path / "file-ubyte")
    (tmp_path / "file-ubyte.gz").write_bytes(b"not gzipped")
    with pytest.raises(ConfigError, match="cannot read"):
        read_idx(tmp_path / "file-ubyte.gz")


def hub(load) -> types.ModuleType:
    module = types.ModuleType("datasets")
    module.load_dataset = load
    return module


def test_a_download_is_read_as_the_files_are(monkeypatch):
    found = {"ylecun/mnist": arrays(), "zalando-datasets/fashion_mnist": arrays(seed=1)}

    def load(name: str):
        return {s: {"image": list(found[name][f"x_{s}"]), "label": found[name][f"y_{s}"]} for s in ("train", "test")}

    monkeypatch.setitem(sys.modules, "datasets", hub(load))
    tasks = downloaded()
    assert same(tasks.capability, arrays())
    assert same(tasks.edit, arrays(seed=1))


def test_a_download_that_fails_is_said_in_one_line(monkeypatch):
    def load(name: str):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", hub(load))
    with pytest.raises(ConfigError, match=r"^cannot download ylecun/mnist: no route to host; .*--data$"):
        downloaded()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        downloaded()


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'crispedit\[experiments\]'"):
        digits()


def test_the_real_files_load_whole():
    default = Path(__file__).parents[2] / "shared" / "data"
    directory = Path(os.environ.get("CRISPEDIT_SHARED_DATA", default))
    if not (directory / "fashion_mnist.npz").is_file():
        pytest.skip("MNIST is not here: set CRISPEDIT_SHARED_DATA to the directory that holds it")
    tasks = from_directory(directory)
    assert (len(tasks.capability.train), len(tasks.edit.train)) == (60_000, 60_000)
    assert (len(tasks.capability.test), len(tasks.edit.test)) == (10_000, 10_000)
    assert tasks.classes == 10
