"""The two tasks of the experiment: images that a network must go on classifying, and others that it is to learn.

MNIST and Fashion-MNIST from a directory (.npz or idx files) or by download; or scikit-learn's bundled digits, so that
the experiment runs anywhere: there 0 to 4 are the capability, and 5 to 9 are learned under the labels 0 to 4. Either
way the new images share the outputs of the old ones, which is what makes them compete.
"""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError

SIDE = 28
MEAN, DEVIATION = 0.5, 0.5
"""What pixels in [0, 1] are normalised by, as in the published experiment."""
NAMES = {
    "mnist": ("mnist", "MNIST"),
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST"),
}
"""Both data sets, and how their files and folders may be called."""
HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
BYTES = 0x08
"""The type of the elements of an idx file."""


@dataclass(frozen=True)
class Labelled:
    """Images with their labels.

    Args:
        images: (n, 1, 28, 28) uint8.
        labels: (n,) int64, from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Labelled":
        """Those at ``indices``."""
        return Labelled(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Task:
    """One data set.

    Args:
        name: For a person.
        train: What is trained on.
        test: What accuracies are measured on.
    """

    name: str
    train: Labelled
    test: Labelled


@dataclass(frozen=True)
class Tasks:
    """What a network can do, and what it is to learn.

    Args:
        capability: It is pretrained on this, which must stay.
        edit: It is fine-tuned on this.
        source: ``digits``, ``directory`` or ``download``.
    """

    capability: Task
    edit: Task
    source: str

    @property
    def classes(self) -> int:
        """How many outputs a network needs."""
        return 1 + max(
            int(part.labels.max()) for task in (self.capability, self.edit) for part in (task.train, task.test)
        )


def normalised(images: Tensor) -> Tensor:
    """(n, 1, 28, 28) float32 in [−1, 1] of uint8 images."""
    return (images.float() / 255 - MEAN) / DEVIATION


# ---------------------------------------------------------------- digits


def digits() -> Tasks:
    """Scikit-learn's 1,797 digits of 8 × 8 pixels, scaled to 28 × 28 by bilinear interpolation, every fourth for test.

    Returns:
        0 to 4 as the capability; 5 to 9, labelled 0 to 4, as what is to be learned.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the bundled digits are scikit-learn's: pip install 'crispedit[experiments]', or give --data"
        ) from None
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    scaled = nn.functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images, labels = (scaled * 255).round().to(torch.uint8), torch.tensor(found.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 4 == 3

    def task(name: str, chosen: Tensor, first: int) -> Task:
        train, held = ((chosen & part).nonzero().flatten() for part in (~test, test))
        return Task(name, Labelled(images[train], labels[train] - first), Labelled(images[held], labels[held] - first))

    return Tasks(task("digits 0–4", labels < 5, 0), task("digits 5–9", labels >= 5, 5), "digits")


# ---------------------------------------------------------------- a directory


def from_directory(directory: Path) -> Tasks:
    """MNIST and Fashion-MNIST from files.

    Args:
        directory: With ``mnist.npz`` and ``fashion_mnist.npz`` (arrays x_train, y_train, x_test, y_test), or with the
            four idx files of each (gzipped or not) in folders ``mnist`` and ``fashion_mnist``; torchvision's
            ``MNIST/raw`` and ``FashionMNIST/raw`` are found too.

    Returns:
        The tasks.

    Raises:
        ConfigError: Files are missing, cannot be read, or are no labelled images of 28 × 28 pixels.
    """
    if not directory.is_dir():
        raise ConfigError(f"--data '{directory}' is no directory; name one with mnist.npz and fashion_mnist.npz")
    mnist, fashion = (_of_directory(directory, name) for name in NAMES)
    return Tasks(mnist, fashion, "directory")


def _of_directory(directory: Path, name: str) -> Task:
    for alias in NAMES[name]:
        if (file := directory / f"{alias}.npz").is_file():
            return _from_npz(file, name)
        for folder in (directory / alias, directory / alias / "raw"):
            if any(folder.glob("train-images*")):
                return _from_idx(folder, name)
    raise ConfigError(f"no {name} in '{directory}': neither {name}.npz nor a folder {name} with its idx files")


def _from_npz(file: Path, name: str) -> Task:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if missing := [key for key in ARRAYS if key not in arrays]:
                raise ConfigError(f"'{file}' has no array {missing[0]}; it needs {', '.join(ARRAYS)}")
            parts = [arrays[key] for key in ARRAYS]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"'{file}' is no .npz file of arrays: {' '.join(str(error).split())}") from error
    return _task(name, parts, str(file))


def _from_idx(folder: Path, name: str) -> Task:
    parts = [
        read_idx(_idx_file(folder, f"{split}-{what}")) for split in ("train", "t10k") for what in ("images", "labels")
    ]
    return _task(name, parts, str(folder))


def _idx_file(folder: Path, stem: str) -> Path:
    found = sorted(
        path for path in folder.glob(f"{stem}*ubyte*") if path.suffix in ("", ".gz") or "ubyte" in path.suffix
    )
    if not found:
        raise ConfigError(f"'{folder}' has no file {stem}-idx…-ubyte or {stem}-idx…-ubyte.gz")
    return found[0]


def read_idx(file: Path) -> np.ndarray[Any, Any]:
    """Reads an idx file of bytes: 0, 0, a type, the number of dimensions, these as big-endian int32, the data.

    Args:
        file: Gzipped if its name ends in .gz.

    Returns:
        The array, uint8.

    Raises:
        ConfigError: It cannot be read, or is not such a file.
    """
    opened: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            data = stream.read()
    except (OSError, EOFError) as error:
        raise ConfigError(f"cannot read '{file}': {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != BYTES or len(data) < 4 + 4 * data[3]:
        raise ConfigError(f"'{file}' is no idx file of bytes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">i4", data[3], 4))
    start = 4 + 4 * data[3]
    if len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise ConfigError(f"'{file}' says shape {shape} and holds {len(data) - start} bytes: it is cut off")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _task(name: str, parts: "list[np.ndarray[Any, Any]]", where: str) -> Task:
    """Checks four arrays, and makes a task of them."""
    x_train, y_train, x_test, y_test = parts
    made = []
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if x.dtype != np.uint8 or x.shape[1:] != (SIDE, SIDE) or y.shape != x.shape[:1] or not len(x):
            raise ConfigError(
                f"'{where}' has images {x.shape} of {x.dtype} and labels {y.shape}; "
                "they must be (n, 28, 28) of uint8 and (n,)"
            )
        labels = torch.from_numpy(y.astype(np.int64))
        if not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
            raise ConfigError(f"'{where}' has labels {int(labels.min())} to {int(labels.max())}; they must be 0 to 9")
        made.append(Labelled(torch.from_numpy(x.copy())[:, None], labels))
    return Task({"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}[name], *made)


# ---------------------------------------------------------------- download


def downloaded() -> Tasks:
    """MNIST and Fashion-MNIST from the Hugging Face hub, through ``datasets``.

    Returns:
        The tasks.

    Raises:
        ConfigError: ``datasets`` is not installed, or the hub cannot be reached.
    """
    mnist, fashion = (_from_hub(name) for name in NAMES)
    return Tasks(mnist, fashion, "download")


def _from_hub(name: str) -> Task:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError("--download needs datasets and pillow: pip install datasets pillow; or give --data") from None
    try:
        splits = load_dataset(HUB[name])
        parts = [
            np.stack([np.asarray(image) for image in splits[split]["image"]])
            if what == "image"
            else np.asarray(splits[split]["label"])
            for split in ("train", "test")
            for what in ("image", "label")
        ]
    except Exception as error:  # of the hub, the network, the cache: each raises its own
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"cannot download {HUB[name]}: {reason}; put the files into a directory for --data"
        ) from error
    return _task(name, parts, HUB[name])
