"""The README.md of a shared model: facts, licence, example, settings and measurements."""

import json
from collections.abc import Sequence
from typing import Any

import edm2
from edm2.data.autoencoder import RELEASED_AUTOENCODER
from edm2.diffusion import consistency_steps
from edm2.hub.pretrained import Pretrained
from edm2.interop.licence import LICENCE

# Of the licences that weights carry -> as the hub lists it.
_HUB_LICENCES = {LICENCE: "cc-by-nc-sa-4.0"}


def model_card(model: Pretrained, name: str) -> str:
    """Write the card.

    Args:
        model: The model.
        name: Folder or repository that the example loads.

    Returns:
        Markdown, after the table that the hub reads.
    """
    parts = [_front_matter(model), f"# {name.rstrip('/').split('/')[-1]}", _what(model)]
    parts += ["## Licence", _licence(model), "## Use", _usage(model, name), "## Settings", _settings(model)]
    if model.results:
        parts += ["## Measured", *_measured(model)]
    parts.append(f"Written by edm2 {edm2.__version__}. Weights are safetensors; nothing here is executed.")
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Pretrained) -> str:
    generator = model.generator
    tags = ["diffusion", "edm2", "conditional" if generator.denoiser.label_dim else "unconditional"]
    if model.carried_license == LICENCE:
        tags.append("non-commercial")
    table: dict[str, Any] = {
        "library_name": "edm2",
        "pipeline_tag": "unconditional-image-generation",  # the hub has no tag for classes
        "tags": tags,
    }
    if model.license is not None:
        table["license"] = _HUB_LICENCES.get(model.license, model.license)
    # JSON values are YAML, too.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in table.items()), "---"])


def _what(model: Pretrained) -> str:
    generator, info = model.generator, model.generator.info
    denoiser = generator.denoiser
    shape = "{1} x {2} x {0}".format(*denoiser.img_shape)
    made = {"pixels": "images", "latents": "latents of an autoencoder", "floats": "arrays"}
    facts = {
        "Makes": f"{made[generator.coding.kind]}, {shape}",
        "Conditioned on": _condition(model),
        "Adds its images to": None
        if generator.residual is None
        else "those that the regression `mean.safetensors` expects",
        "Network": f"{denoiser.title}, {sum(p.numel() for p in denoiser.parameters()):,} parameters",
        "Trained on": info.get("data"),
        "Training images seen": None if info.get("num_images") is None else f"{info['num_images']:,}",
        "EMA length (sigma_rel)": None if info.get("sigma_rel") is None else f"{info['sigma_rel']:g}",
        "Expected error of that average": _percent(info.get("expected_error")),
        "Run": info.get("run_id"),
        "Distilled from": (info.get("consistency") or {}).get("teacher"),
        "Made from": (info.get("source") or {}).get("file"),
        "Digest of the weights": generator.identity()["digest"],
    }
    kind = "regression with a network" if info.get("objective") == "mean" else "diffusion model"
    lead = (
        f"A {kind} of [EDM2](https://arxiv.org/abs/2312.02696) (magnitude-preserving network, "
        "post-hoc EMA), for the Python package `edm2`."
    )
    return f"{lead}\n\n{_table(('', ''), [(key, v) for key, v in facts.items() if v is not None])}"


def _condition(model: Pretrained) -> str:
    generator = model.generator
    coding, parts = generator.coding, []
    if coding.condition is not None:
        parts.append("images, {1} x {2} x {0}".format(*coding.condition.shape))
    if generator.takes_vectors:
        length = generator.denoiser.label_dim if coding.vectors is None else len(coding.vectors.mean)
        parts.append(f"vectors of length {length}")
    if generator.num_classes:
        names = ", ".join(map(str, generator.class_names[:20]))
        more = ", ..." if len(generator.class_names) > 20 else ""
        parts.append(f"{generator.num_classes} classes" + (f": {names}{more}" if names else ""))
    return "; ".join(parts) or "nothing"


def _licence(model: Pretrained) -> str:
    if model.carried_license is None:
        return f"Licence of these weights: {model.license or 'not stated by their author'}."
    mark = "**Not for commercial use.** " if model.carried_license == LICENCE else ""
    notice = model.license_notice or f"the weights are under {model.carried_license}"
    return f"{mark}{notice[0].upper()}{notice[1:]}. Keep the licence notice with the files."


def _usage(model: Pretrained, name: str) -> str:
    generator = model.generator
    extras = "cli,hub,latent" if generator.coding.kind == "latents" else "cli,hub"
    given, inputs = "num_images=4", ""
    if told := _inputs(model):
        shapes = " and ".join(f"{name} {shape}" for name, shape in told.items())
        inputs = f'inputs = np.load("inputs.npz")  # {shapes}, in the units of the training data\n'
        given = ", ".join(f'{"class_labels" if name == "labels" else name}=inputs["{name}"]' for name in told)
    elif generator.num_classes:
        classes = [i % generator.num_classes for i in range(4)]
        given = f"class_labels={classes}"
    elif generator.takes_vectors:
        given = f"class_labels=[[0.0] * {generator.denoiser.label_dim}] * 4"
    if generator.denoiser.cond_channels and not told:
        channels, sides = generator.denoiser.cond_channels, generator.denoiser.img_shape[1:]
        given += f", conditions=torch.zeros(4, {channels}, {sides[0]}, {sides[1]})"
    picture = generator.coding.kind != "floats"
    result = 'images[0].save("sample.png")' if picture else "print(images.shape)"
    kind = "" if picture else ', output_type="np"'
    decoded = ""
    if generator.coding.kind == "latents":
        decoded = f" Latents are decoded by `{RELEASED_AUTOENCODER}`; for another autoencoder give `vae=`."
    given_too = ", and on what it is given" if inputs else " alone"
    return f"""\
In a clone of edm2's repository:

```
pip install -e '.[{extras}]'
```

```python
{"import numpy as np" + chr(10) if inputs else ""}import torch
from edm2.hub import EDM2Pipeline

pipe = EDM2Pipeline.from_pretrained({json.dumps(name)})
{inputs}images = pipe({given}, generator=torch.Generator().manual_seed(0){kind}).images
{result}
```

`seeds=[0, 1, 2, 3]` instead of a generator names each image: it depends on its seed{given_too}.{decoded}"""


def _inputs(model: Pretrained) -> dict[str, str]:
    """Name and shape of the arrays that a model of pairs is given; empty for other models."""
    coding, told = model.generator.coding, {}
    if coding.condition is not None:
        told["conditions"] = f"[N, {', '.join(map(str, coding.condition.shape))}]"
    if coding.vectors is not None:
        told["vectors"] = f"[N, {len(coding.vectors.mean)}]"
    if told and model.generator.num_classes:
        told["labels"] = "[N]"
    return told


def _settings(model: Pretrained) -> str:
    sampling, guide = model.sampling, model.guide
    rows: list[tuple[str, object]] = [("Sampler", sampling.sampler), ("Steps", sampling.num_steps)]
    if model.generator.is_student:
        first = model.generator.info["consistency"]["sigma_max"]
        levels = consistency_steps(sampling.num_steps, sampling.levels, first)[:-1]
        rows.append(("Noise levels", " ".join(f"{level:.3g}" for level in levels)))
    if guide is None:
        rows.append(("Guidance", "none"))
    else:
        seen, length = guide.info.get("num_images"), guide.info.get("sigma_rel")
        about = "" if seen is None else f", {seen:,} training images seen"
        about += "" if length is None else f", EMA length {length:g}"
        rows += [("Guidance weight", f"{sampling.guidance:g}"), ("Guide", f"`guide.safetensors`{about}")]
        if sampling.interval is not None:
            low, high = sampling.interval
            rows.append(("Guidance acts for sigma in", f"({low:g}, {high:g}]"))
    return _table(("setting", "default"), rows)


def _measured(model: Pretrained) -> list[str]:
    """A table of numbers, and for each way of measuring how they came about."""
    ways: list[dict[str, str]] = []
    rows = []
    for result in model.results:
        if result.provenance not in ways:
            ways.append(result.provenance)
        rows.append((result.metric, f"{result.value:.6g}", f"({ways.index(result.provenance) + 1})"))
    told = [
        f"({number}) " + "; ".join(f"{key}: {value}" for key, value in way.items()) + "."
        for number, way in enumerate(ways, 1)
    ]
    return [_table(("metric", "value", "how"), rows), *map(_plain, told)]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _plain(text: object) -> str:
    # Names of files and classes come from others: one line, and no HTML.
    return " ".join(str(text).split()).replace("<", "&lt;")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2g}%"
