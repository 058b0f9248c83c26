"""A small classifier trained on the real images: the in-domain feature extractor of the demo.

Inception's features mean little on 8x8 gray digits. The last layer but one of a network that tells the classes of
this data set apart gives features in which a Frechet distance has a meaning.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from edm2.files import write_atomic
from edm2.metrics.extractors import check_images
from edm2.metrics.tensor_file import read_tensor_file, to_metadata

_BLOCK = 1000
_BATCH, _PEAK_LR = 128, 2e-3
_FORMAT = "edm2 feature classifier 2"


class ClassifierFeatures:
    """Features and classes of images by a trained network.

    `fit_classifier` makes it.

    Attributes:
        image_shape: `(C, H, W)` that it was trained on.
        name: As in `FeatureExtractor`, like `resize` and `num_features`.
    """

    name = "classifier"
    resize = "none: images of the shape it was trained on, scaled to [-1, 1]"

    def __init__(self, network: "_Network") -> None:
        self.image_shape: tuple[int, int, int] = network.settings["shape"]
        self.num_features: int = network.settings["num_features"]
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> "ClassifierFeatures":
        """Open a saved classifier.

        Raises:
            ValueError: If the file holds something else.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"there is no classifier at {path}: `edm2 metrics ref DATA --out FILE` trains and saves one"
            )
        try:
            header, state = read_tensor_file(path, "pt", _FORMAT)
            broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
            if broken:
                raise ValueError(f"{broken[0]} holds values that are not finite")
            with torch.device("meta"):  # nothing is allocated, whatever size the header claims
                network = _Network(**header["settings"])
            network.load_state_dict(state, assign=True)
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a classifier that `ClassifierFeatures.save` wrote ({error})"
            ) from error
        return cls(network.float())

    def save(self, path: str | Path) -> None:
        """Write the network as safetensors; the same network gives the same bytes."""
        metadata = to_metadata(_FORMAT, {"settings": self._network.settings})
        write_atomic(path, save(self._network.state_dict(), metadata))

    @cached_property
    def sha256(self) -> str:
        """Hash of the network's weights."""
        digest = hashlib.sha256(str(self.image_shape).encode())
        for name, tensor in sorted(self._network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Activations of the last layer but one.

        Args:
            images: `[N, C, H, W]` uint8.

        Returns:
            `[N, D]` float32 on the CPU.

        Raises:
            ValueError: If the type or shape is wrong.
        """
        return self._run(images)[0]

    def predict(self, images: np.ndarray | Tensor) -> Tensor:
        """Most likely classes, `[N]` int64; images and errors as in `features`."""
        return self._run(images)[1].argmax(dim=1)

    @torch.no_grad()
    def _run(self, images: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        images = check_images(images)
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images have the shape {list(images.shape[1:])}, but the classifier was trained on "
                f"{list(self.image_shape)}: score with images of the training set's shape"
            )
        parts = [self._network(_scaled(block)) for block in images.split(_BLOCK)]
        features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return features, logits


def fit_classifier(
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    *,
    num_classes: int,
    seed: int = 0,
    num_steps: int = 300,
) -> ClassifierFeatures:
    """Train a small convolutional classifier on the CPU.

    One convolution per resolution, halved until 4 pixels or fewer are left on a side, then two linear layers.
    It trains in one thread: layers this small gain little from a second one, and become ten times slower if another
    process uses its core. The same arguments give the same network on the same machine.

    Args:
        images: `[N, C, H, W]` uint8, real.
        labels: `[N]` integers in [0, num_classes).
        num_classes: At least 2.
        seed: Seed of initial weights and order.
        num_steps: Training steps.

    Returns:
        The trained network's features.

    Raises:
        ValueError: If images or labels have the wrong type, shape or range.
    """
    images, labels = check_images(images), torch.as_tensor(labels).long()
    if labels.shape != images.shape[:1] or len(labels) == 0:
        raise ValueError(f"{list(labels.shape)} labels do not fit {len(images)} images")
    if num_classes < 2 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels {int(labels.min())} to {int(labels.max())} do not fit num_classes {num_classes}: "
            "they must lie in [0, num_classes), and there must be at least 2 classes"
        )
    with torch.random.fork_rng(devices=()):  # torch draws initial weights from the global state
        network = _Network(shape=images.shape[1:], num_classes=num_classes)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _train(network, images, labels, torch.Generator().manual_seed(seed), num_steps)
    finally:
        torch.set_num_threads(threads_before)
    return ClassifierFeatures(network)


def _train(
    network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, num_steps: int
) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=math.sqrt(2 / parameter[0].numel()), generator=generator)
    optimiser = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    network.train()
    for step in range(num_steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        logits = network(_scaled(images[chosen]))[1]
        loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        warmup = min((step + 1) / max(0.1 * num_steps, 1), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = _PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class _Network(nn.Module):
    """Maps `[B, C, H, W]` in [-1, 1] to features `[B, num_features]` and logits `[B, num_classes]`."""

    def __init__(
        self, *, shape: Sequence[int], num_classes: int, width: int = 32, num_features: int = 64
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = dict(
            shape=tuple(shape), num_classes=num_classes, width=width, num_features=num_features
        )
        channels, *sides = shape
        layers: list[nn.Module] = []
        out = width
        # Above 16 pixels the first convolution would cost more than all others together.
        stride = 2 if max(sides) > 16 else 1
        sides = [-(-side // stride) for side in sides]
        while True:
            conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            channels, stride = out, 1
            if max(sides) <= 4:
                break
            out = min(2 * out, 4 * width)
            sides = [-(-side // 2) for side in sides]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.neck = nn.Linear(channels * math.prod(sides), num_features)
        self.head = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.neck.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.neck(self.body(x))
        return features, self.head(functional.relu(features))


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
