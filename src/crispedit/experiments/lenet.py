"""LeNet-5, its pretraining, and its division at one matrix: what lies below is run once, what lies above is small.

conv 1→6 (5 × 5), pool, conv 6→16 (5 × 5), pool, 256→120→84→classes (LeCun et al., Gradient-based learning applied to
document recognition, 1998, as it is usually written today, with max pooling). The activation is ReLU, and is not put on
the logits; or tanh, as in 1998. That is no detail here: between the kinks of ReLU a network is linear in any one of its
matrices, and then the Hessian of its loss in that matrix *is* the Gauss–Newton Hessian. With tanh it is not.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..progress import Progress, no_progress
from .images import Labelled, normalised

MATRICES = ("fc1", "fc2")
"""The hidden matrices that may be edited: 120 × 256 and 84 × 120."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
CHUNK = 2048


def lenet(classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """The network, with torch's default initialisation from the global generator; children have the names used here."""
    act = ACTIVATIONS[activation]
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(1, 6, 5), act1=act(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5), act2=act(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
        fc1=nn.Linear(256, 120), act3=act(),
        fc2=nn.Linear(120, 84), act4=act(),
        fc3=nn.Linear(84, classes),
    )  # fmt: skip
    return nn.Sequential(layers)


@dataclass(frozen=True)
class Division:
    """A network divided at a linear layer y = W a + b.

    Args:
        below: Images to a, (n, d_in).
        weight: W, (d_out, d_in).
        bias: b, (d_out,).
        above: y, (…, d_out), to logits, (…, classes).
    """

    below: nn.Module
    weight: Tensor
    bias: Tensor
    above: nn.Module

    @classmethod
    def of(cls, network: nn.Sequential, matrix: str) -> "Division":
        """Divides a network at the layer named ``matrix``; parameters are shared, and frozen."""
        names = [name for name, _ in network.named_children()]
        at = names.index(matrix)
        layer = network[at]
        assert isinstance(layer, nn.Linear)
        return cls(network[:at], layer.weight.detach(), layer.bias.detach(), network[at + 1 :].requires_grad_(False))

    @torch.no_grad()
    def inputs(self, images: Tensor) -> Tensor:
        """What the matrix is given, a, of uint8 images: (n, d_in) float32; the same whatever W becomes."""
        return torch.cat([self.below(normalised(part)) for part in torch.split(images, CHUNK)])


@dataclass(frozen=True)
class Pretraining:
    """How a network is pretrained: SGD with momentum, its rate rising for a fifth of the steps and then falling to 0.

    Args:
        epochs: Passes over the images.
        batch_size: Images a step.
        lr: The highest rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        validation: How many training images are held out to choose the epoch by: this share.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    validation: float = 1 / 12


def pretrained(
    train: Labelled,
    classes: int,
    *,
    activation: str = "relu",
    settings: Pretraining | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[nn.Sequential, float]:
    """Trains LeNet-5, and returns it as it was after the epoch that was best on images held out from ``train``.

    Args:
        train: Labelled images; a part is held out, and the test images play no part in any choice.
        classes: Outputs.
        activation: ``relu`` or ``tanh``.
        settings: Of the training.
        seed: Of weights, split and order.
        progress: Told of every epoch.

    Returns:
        The network, frozen, and its accuracy on the images held out (0 to 1).

    Raises:
        NumericsError: The loss is not finite.
    """
    settings = settings or Pretraining()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    count = round(settings.validation * len(train))
    held, kept = order[:count], order[count:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = lenet(classes, activation)
    steps = settings.epochs * math.ceil(len(kept) / settings.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    best, state = -1.0, {}
    for epoch in range(settings.epochs):
        progress("pretraining, epochs", epoch, settings.epochs)
        for indices in torch.split(kept[torch.randperm(len(kept), generator=generator)], settings.batch_size):
            batch = train.take(indices)
            loss = nn.functional.cross_entropy(network(normalised(batch.images)), batch.labels)
            if not math.isfinite(loss.item()):
                raise NumericsError(f"pretraining diverged in epoch {epoch + 1}: the loss is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if (score := accuracy(network, train.take(held))) > best:
            # a copy: state_dict() refers to the weights that go on being trained
            best, state = score, {name: value.clone() for name, value in network.state_dict().items()}
    progress("pretraining, epochs", settings.epochs, settings.epochs)
    network.load_state_dict(state)
    return network.requires_grad_(False), best


@torch.no_grad()
def accuracy(network: nn.Module, data: Labelled) -> float:
    """Share of images that are classified rightly, 0 to 1."""
    right = 0
    for images, labels in zip(torch.split(data.images, CHUNK), torch.split(data.labels, CHUNK), strict=True):
        right += int((network(normalised(images)).argmax(1) == labels).sum())
    return right / len(data)
