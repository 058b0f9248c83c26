"""Sample images from an exported network, without edm2: python sample.py --count 16 --out images.npy."""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "model.json").read_text()) if (HERE / "model.json").exists() else {}
Network = Callable[[dict[str, np.ndarray]], np.ndarray]


def load(name: str) -> Network:
    """Open NAME.onnx with onnxruntime, or NAME.pt2 with torch."""
    if (HERE / f"{name}.onnx").exists():
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]

        session = onnxruntime.InferenceSession(HERE / f"{name}.onnx")
        return lambda inputs: np.asarray(session.run(None, inputs)[0])
    import torch

    net = torch.export.load(HERE / f"{name}.pt2").module()
    return lambda inputs: np.asarray(net(**{k: torch.from_numpy(v) for k, v in inputs.items()}).detach())


def denoise(
    networks: dict[str, Network], x: np.ndarray, sigma: float, given: dict[str, np.ndarray]
) -> np.ndarray:
    """Expected clean images, with guidance where the model has a guide (EDM2, arXiv 2312.02696, Eq. 11)."""
    inputs = {"x": x, "sigma": np.full(len(x), sigma, np.float32), **given}
    low, high = ABOUT["interval"]
    main, *guide = (
        networks[name]({key: inputs[key] for key in ABOUT["inputs"][name]})
        for name in ("model", "guide")
        if name == "model" or (name in networks and low < sigma and (high is None or sigma <= high))
    )
    return np.asarray(main if not guide else guide[0] + np.float32(ABOUT["guidance"]) * (main - guide[0]))


def sample(
    networks: dict[str, Network], noise: np.ndarray, steps: int, given: dict[str, np.ndarray]
) -> np.ndarray:
    """Heun's method (EDM, arXiv 2206.00364, Alg. 1), from unit noise [B, C, H, W] to images in network units."""
    if ABOUT["consistency_levels"]:  # of a student of `edm2 distill`: denoise, add noise, denoise
        x, rng = np.zeros_like(noise), np.random.default_rng(1)
        for level in map(np.float32, ABOUT["consistency_levels"]):
            x = denoise(networks, x + level * noise, level, given)
            noise = rng.standard_normal(x.shape).astype(np.float32)
        return np.asarray(x)
    ends = ABOUT.get("sigma_max", 80) ** (1 / 7), 0.002 ** (1 / 7)
    levels = [*((ends[0] + np.arange(steps) / max(steps - 1, 1) * (ends[1] - ends[0])) ** 7).tolist(), 0.0]
    x = noise * np.float32(levels[0])
    for now, after in itertools.pairwise(levels):
        slope = (x - denoise(networks, x, now, given)) / np.float32(now)
        end = x + np.float32(after - now) * slope
        if after > 0:
            slope = (slope + (end - denoise(networks, end, after, given)) / np.float32(after)) / 2
            end = x + np.float32(after - now) * slope
        x = end
    return np.asarray(x)


def to_images(x: np.ndarray) -> np.ndarray:
    """Network units to bytes, or to the data's own units for floats and latents."""
    mean, std = (np.array(ABOUT[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    x = x * (std / np.float32(ABOUT["sigma_data"])) + mean
    return (
        np.asarray(np.clip(x * 127.5 + 128, 0, 255), np.uint8) if ABOUT["kind"] == "pixels" else np.asarray(x)
    )


def main() -> None:
    """Read the options, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--noise", help=".npy file of unit noise, [count, C, H, W], instead of a seed")
    parser.add_argument(
        "--labels", help=".npy file, [count, label_dim], one-hot; default: each class in turn"
    )
    parser.add_argument("--condition", help=".npy file of condition images, [count, cond_channels, H, W]")
    parser.add_argument("--steps", type=int, default=ABOUT["num_steps"], help="noise levels")
    parser.add_argument("--out", default="images.npy", help="file for the images, [count, C, H, W]")
    args = parser.parse_args()
    shape = (args.count, *ABOUT["shape"])
    noise = np.load(args.noise) if args.noise else np.random.default_rng(args.seed).standard_normal(shape)
    given = {key: np.load(getattr(args, key)) for key in ("labels", "condition") if getattr(args, key)}
    if classes := ABOUT["label_dim"]:
        given.setdefault("labels", np.eye(classes)[np.arange(len(noise)) % classes])
    given = {key: value.astype(np.float32) for key, value in given.items()}
    networks = {name: load(name) for name in ABOUT["inputs"]}
    np.save(args.out, to_images(sample(networks, noise.astype(np.float32), args.steps, given)))


if __name__ == "__main__":
    main()
