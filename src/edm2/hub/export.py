"""Trained networks for programs that do not know edm2: `torch.export`, ONNX, diffusers.

The weights are normalised once, into the graph; batches have any size. An exported folder has a sampler next to the
network, which needs neither edm2 nor, for ONNX, torch.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import edm2
from edm2.diffusion import Denoiser
from edm2.diffusion.fixed_weights import SamplingNetwork
from edm2.extras import need
from edm2.files import read_json, replacing_folder, write_atomic, write_json
from edm2.generate import ImageGenerator, SamplerOptions
from edm2.generate.sampler_options import STUDENT_SAMPLER
from edm2.hub.pretrained import Pretrained
from edm2.nn import keyed_normal

Format = Literal["pt2", "onnx", "diffusers"]
TOLERANCE = 1e-4
"""Largest difference from edm2's own images after a whole sampling run, in units of sigma_data."""
_ABOUT = "model.json"
_CHECK_IMAGES, _CHECK_STEPS = 2, 16
_ONE_FILE = 1 << 30  # bytes; protobuf, in which ONNX is written, ends at twice that


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of `export_model`.

    Attributes:
        folder: The folder written.
        difference: Largest difference from edm2's own images after a whole sampling run, in units of sigma_data.
    """

    folder: Path
    difference: float


def export_model(model: Pretrained, to: Format, folder: str | Path) -> Exported:
    """Write a model, and its guide where it has one, for use without edm2, and check what was written.

    Args:
        model: The model; `edm2.hub.open_pretrained` opens runs and files.
        to: `pt2` and `onnx` write networks as functions of `x`, `sigma` and, where the model has them, `labels` and
            `condition`, with float32 inputs and outputs in network units, together with `model.json` and `sample.py`.
            `diffusers` writes an `edm2.hub.diffusers.EDM2Model` and a scheduler; it needs edm2 to be read.
        folder: Folder to write.

    Returns:
        The folder, and how far its images are from edm2's own. A folder that holds this export already is kept.

    Raises:
        ValueError: If the model is a regression or a residual model.
        FileExistsError: If the folder exists and holds anything else.
        FloatingPointError: If the images differ by more than `TOLERANCE`; nothing is written.
    """
    folder = Path(folder)
    if model.generator.residual is not None or model.generator.info.get("objective") == "mean":
        raise ValueError(
            "the model is a regression or a residual model, which exported samplers do not support: share it with "
            "edm2.hub.save_pretrained instead"
        )
    parts = {"model": model.generator, **({} if model.guide is None else {"guide": model.guide})}
    about = _about(model, parts, to)
    if folder.exists():
        return _same(folder, about)
    write = {"pt2": _write_pt2, "onnx": _write_onnx, "diffusers": _write_diffusers}[to]
    difference = 0.0
    with replacing_folder(folder) as aside:
        for name, part in parts.items():
            load = write(part, aside / name)
            difference = max(difference, _difference(part, load()))
        if difference > TOLERANCE:
            raise FloatingPointError(
                f"images of the {to} network differ by {difference:.1e} sigma_data from edm2's, more than "
                f"{TOLERANCE:g}: choose another format, and report this"
            )
        if to != "diffusers":
            script = Path(__file__).with_name("exported_sampler.py").read_bytes()
            write_atomic(aside / "sample.py", script)
        write_json(aside / _ABOUT, {**about, "difference": difference})
    return Exported(folder=folder, difference=difference)


def _same(folder: Path, about: dict[str, Any]) -> Exported:
    """The export that a folder holds, if it is the one that is asked for."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = dict(read_json(folder / _ABOUT))
        difference = float(found.pop("difference"))
        if found == json.loads(json.dumps(about)):
            return Exported(folder=folder, difference=difference)
    raise FileExistsError(
        f"{folder} exists already and holds something else: choose another --out, or move it away"
    )


class _Exportable(nn.Module):
    """A denoiser with the inputs that exported graphs have, and its weights fixed."""

    def __init__(self, generator: ImageGenerator) -> None:
        super().__init__()
        fixed = SamplingNetwork(generator.denoiser, fold=False)
        # Channels-last weights, faster on some CPUs, are not what the file formats expect.
        denoiser: Any = fixed.module.float()
        self.denoiser: Denoiser = denoiser.to(memory_format=torch.contiguous_format)
        self.denoiser.dtype = torch.float32

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        denoised: Tensor = self.denoiser(x, sigma, labels, condition=condition)
        return denoised


def _inputs(generator: ImageGenerator) -> dict[str, tuple[int, ...]]:
    """Inputs of an exported network, and their shapes without the batch."""
    denoiser = generator.denoiser
    shape = denoiser.img_shape
    inputs: dict[str, tuple[int, ...]] = {"x": shape, "sigma": ()}
    if denoiser.label_dim:
        inputs["labels"] = (denoiser.label_dim,)
    if denoiser.cond_channels:
        inputs["condition"] = (denoiser.cond_channels, *shape[1:])
    return inputs


def _graph(generator: ImageGenerator) -> Any:
    """The network as a `torch.export.ExportedProgram`."""
    batch = torch.export.Dim("batch")
    # Of 3, which no other size should be bound to; values do not matter.
    examples = {name: torch.ones(3, *shape) for name, shape in _inputs(generator).items()}
    dynamic = {name: {0: batch} for name in examples}
    module = _Exportable(generator).to("cpu").eval()
    return torch.export.export(module, (), examples, dynamic_shapes=dynamic)


_Call = Callable[[dict[str, Tensor]], Tensor]


def _write_pt2(generator: ImageGenerator, path: Path) -> Callable[[], _Call]:
    file = path.with_suffix(".pt2")
    torch.export.save(_graph(generator), file)

    def load() -> _Call:
        module: Any = torch.export.load(file).module()
        return lambda inputs: module(**inputs)

    return load


def _write_onnx(generator: ImageGenerator, path: Path) -> Callable[[], _Call]:
    need("onnxscript", "export to ONNX")
    runtime = need("onnxruntime", "export to ONNX")
    file = path.with_suffix(".onnx")
    size = sum(p.numel() * 4 for p in generator.denoiser.parameters())
    with _quiet("torch.onnx"):
        program: Any = torch.onnx.export(_graph(generator), dynamo=True, verbose=False)
        program.save(file, external_data=size > _ONE_FILE)

    def load() -> _Call:
        session = runtime.InferenceSession(file)
        return lambda inputs: torch.from_numpy(
            session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        )

    return load


def _write_diffusers(generator: ImageGenerator, path: Path) -> Callable[[], _Call]:
    need("diffusers", "export to diffusers")
    from edm2.hub.diffusers import EDM2Model

    model = EDM2Model.from_denoiser(generator.denoiser)
    model.save_pretrained(path)
    model.scheduler(generator.sampler_options().sigma_max).save_pretrained(path.with_name("scheduler"))

    def load() -> _Call:
        read = EDM2Model.from_pretrained(path)
        return lambda inputs: read.denoise(**inputs)

    return load


def _difference(generator: ImageGenerator, call: _Call) -> float:
    """Largest difference after a sampling run, in units of sigma_data."""
    index = torch.arange(_CHECK_IMAGES)
    shapes = _inputs(generator)
    noise = keyed_normal(index, shapes["x"])
    given = {
        name: keyed_normal(index, shape, stream=1)
        for name, shape in shapes.items()
        if name not in ("x", "sigma")
    }
    if generator.num_classes and not generator.takes_vectors:
        given["labels"] = torch.eye(generator.num_classes)[index % generator.num_classes]
    options = SamplerOptions(sampler="heun", num_steps=_CHECK_STEPS)
    own = _Exportable(generator).to("cpu").eval()

    def run(network: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        def denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
            return network({"x": x, "sigma": sigma.float().expand(len(x)).contiguous(), **given})

        return options.sample(denoiser, noise, randn_like=torch.randn_like)

    with torch.no_grad():
        difference = (run(call) - run(lambda inputs: own(**inputs))).abs().max()
    return float(difference) / generator.denoiser.sigma_data


def _about(model: Pretrained, parts: dict[str, ImageGenerator], to: Format) -> dict[str, Any]:
    generator = model.generator
    coding, info = generator.coding, generator.info
    steps, levels = model.sampling.num_steps, []
    if generator.is_student:
        options = generator.sampler_options(
            num_steps=steps if model.sampling.sampler == STUDENT_SAMPLER else 2
        )
        levels = options.sigmas()[:-1].tolist()
    low, high = model.sampling.to_json()["interval"] or (0.0, None)
    facts = {
        key: info[key]
        for key in ("data", "num_images", "sigma_rel", "license", "license_notice")
        if key in info
    }
    return {
        "format": f"edm2.exported/1 {to}",
        "digests": {name: part.identity()["digest"] for name, part in parts.items()},
        "edm2": edm2.__version__,
        "about": facts,
        "inputs": {name: list(_inputs(part)) for name, part in parts.items()},
        "shape": list(generator.denoiser.img_shape),
        "label_dim": generator.denoiser.label_dim or 0,
        "class_names": list(generator.class_names),
        "kind": coding.kind,
        "mean": list(coding.values.mean),
        "std": list(coding.values.std),
        "sigma_data": coding.values.sigma_data,
        # The sampler next to the model is Heun's, or a student's.
        "num_steps": steps if model.sampling.sampler in ("heun", STUDENT_SAMPLER) else 32,
        "consistency_levels": levels,
        "sigma_max": info.get("sigma_max", SamplerOptions.sigma_max),
        "guidance": model.sampling.guidance,
        "interval": [low, high],
    }


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep from the user what torch says about its own code, and about packages that are not needed here."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
