"""A small classifier trained on the real images: the in-domain feature extractor of the demo.

Inception's features mean little on 8x8 gray digits. The last layer but one of a network that tells the classes of
this data set apart gives features in which a Frechet distance has a meaning.
"""

import hashlib
import math
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
_FORMAT = "edm2 feature classifier 2"


class ClassifierFeatures:
    """Features and classes of images by a trained network.

    Args:
        network: Maps `[B, C, H, W]` in [-1, 1] to features `[B, D]` and logits `[B, num_classes]`.
        image_shape: `(C, H, W)` that it was trained on.

    Attributes:
        name: As in `FeatureExtractor`, like `resize`.
    """

    name = "classifier"
    resize = "none: images of the shape it was trained on, scaled to [-1, 1]"

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape
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
            settings = header["settings"]
            settings["shape"] = tuple(settings["shape"])
            broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
            if broken:
                raise ValueError(f"{broken[0]} holds values that are not finite")
            network = _Network(**settings, generator=torch.Generator())
            network.load_state_dict(state)
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a classifier that `ClassifierFeatures.save` wrote ({error})"
            ) from error
        return cls(network, network.settings["shape"])

    def save(self, path: str | Path) -> None:
        """Write the network as safetensors; the same network gives the same bytes.

        Raises:
            ValueError: For a network that `fit_classifier` did not make.
        """
        if not isinstance(self._network, _Network):
            raise ValueError(
                "only a network that fit_classifier made can be saved: save others by other means"
            )
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

    @cached_property
    def num_features(self) -> int:
        """D."""
        return self.features(torch.zeros(1, *self.image_shape, dtype=torch.uint8)).shape[1]

    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Activations of the last layer but one.

        Args:
            images: `[N, C, H, W]` uint8.

        Returns:
            `[N, D]` float32 on the CPU.

        Raises:
            ValueError: For another type or shape.
        """
        return self._run(images)[0]

    def predict(self, images: np.ndarray | Tensor) -> Tensor:
        """Most likely classes, `[N]` int64; images and errors as in `features`."""
        return self._run(images)[1].argmax(dim=1)

    def accuracy(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> float:
        """Share of images whose predicted class is the given one, in [0, 1]."""
        predicted = self.predict(images)
        labels = torch.as_tensor(labels)
        if labels.shape != predicted.shape or len(labels) == 0:
            raise ValueError(f"{list(labels.shape)} labels do not fit {len(predicted)} images")
        return float((predicted == labels).double().mean())

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
    batch_size: int = 128,
    width: int = 32,
    num_features: int = 64,
    shift: int = 0,
    lr: float = 2e-3,
    num_threads: int = 1,
) -> ClassifierFeatures:
    """Train a small convolutional classifier on the CPU.

    One convolution a resolution, halved until 4 pixels or fewer are left on a side, then two linear layers.
    The same arguments give the same network on the same machine.

    Args:
        images: `[N, C, H, W]` uint8, real.
        labels: `[N]` integers in [0, num_classes).
        num_classes: At least 2.
        seed: Of initial weights, order and shifts.
        num_steps: Training steps.
        batch_size: Images a step.
        width: Channels of the first convolution.
        num_features: D.
        shift: Largest random shift in pixels each way, filled with the border's colour. Digits
            of 8x8 fill their frame, and one pixel already costs a point of accuracy.
        lr: Peak learning rate of Adam, reached after a tenth of the steps and lowered to 0 by a cosine.
        num_threads: Threads to train with, at least 1; torch's setting is put back afterwards. Layers this
            small gain little from a second thread, and lose tenfold where another process has its core.

    Returns:
        The trained network's features.

    Raises:
        ValueError: For images or labels of another type, shape or range.
    """
    images, labels = check_images(images), torch.as_tensor(labels).long()
    if labels.shape != images.shape[:1] or len(labels) == 0:
        raise ValueError(f"{list(labels.shape)} labels do not fit {len(images)} images")
    if num_classes < 2 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels {int(labels.min())} to {int(labels.max())} do not fit num_classes {num_classes}: "
            "they must lie in [0, num_classes), and there must be at least 2 classes"
        )
    if num_threads < 1:
        raise ValueError(f"num_threads {num_threads} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    network = _Network(shape, num_classes, width=width, num_features=num_features, generator=generator)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        _train(
            network, images, labels, generator, num_steps=num_steps, batch_size=batch_size, shift=shift, lr=lr
        )
    finally:
        torch.set_num_threads(threads_before)
    return ClassifierFeatures(network, shape)


def _train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    num_steps: int,
    batch_size: int,
    shift: int,
    lr: float,
) -> None:
    optimiser = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99))
    network.train()
    for step in range(num_steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        batch = _shifted(_scaled(images[chosen]), shift, generator)
        loss = functional.cross_entropy(network(batch)[1], labels[chosen], label_smoothing=0.05)
        warmup = min((step + 1) / max(0.1 * num_steps, 1), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class _Network(nn.Module):
    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int,
        num_features: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = dict(
            shape=shape, num_classes=num_classes, width=width, num_features=num_features
        )
        channels, height, width_px = shape
        layers: list[nn.Module] = []
        out = width
        # Above 16 pixels the first convolution would cost more than all others together.
        stride = 2 if max(height, width_px) > 16 else 1
        height, width_px = -(-height // stride), -(-width_px // stride)
        while True:
            layers += [_conv(channels, out, stride=stride), nn.BatchNorm2d(out), nn.ReLU()]
            channels, stride = out, 1
            if max(height, width_px) <= 4:
                break
            out = min(2 * out, 4 * width)
            height, width_px = -(-height // 2), -(-width_px // 2)
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.neck = nn.utils.skip_init(nn.Linear, channels * height * width_px, num_features)
        self.head = nn.utils.skip_init(nn.Linear, num_features, num_classes)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                with torch.no_grad():
                    parameter.normal_(std=math.sqrt(2 / fan_in), generator=generator)
        nn.init.zeros_(self.neck.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.neck(self.body(x))
        return features, self.head(functional.relu(features))


def _conv(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    # skip_init leaves the global random state alone.
    conv: nn.Module = nn.utils.skip_init(
        nn.Conv2d, in_channels, out_channels, 3, stride=stride, padding=1, bias=False
    )
    return conv


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    if shift == 0:
        return images
    batch, _, height, width = images.shape
    padded = functional.pad(images, (shift,) * 4, mode="replicate")
    tops, lefts = torch.randint(2 * shift + 1, (2, batch, 1, 1), generator=generator)
    rows = (tops + torch.arange(height)[:, None]).expand(batch, height, width)
    columns = (lefts + torch.arange(width)).expand(batch, height, width)
    return padded[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
