"""`edm2 metrics ref | score | compare | ensemble`."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from edm2.commands.metrics_ensemble import ensemble as ensemble
from edm2.diffusion import MODEL_FILE
from edm2.evaluation.comparison import (
    CopySources,
    Measuring,
    Side,
    fit_classifier_beside,
    score_sides,
    try_extractor,
)
from edm2.evaluation.extractors import EXTRACTORS, open_extractor
from edm2.evaluation.generated import GeneratedImages, generated_set
from edm2.evaluation.images import MIN_IMAGES, ImageSet, open_images
from edm2.evaluation.references import is_reference, read_reference
from edm2.evaluation.results import (
    COPY_NAMES,
    SCORE_NAMES,
    differences,
    provenance_of,
    read_result,
    without_numbers,
)
from edm2.hub import open_pretrained
from edm2.metrics import (
    ClassifierFeatures,
    FeatureExtractor,
    Reference,
    describe_extractor,
)
from edm2.metrics.measure import KEPT_FEATURES
from edm2.progress import show
from edm2.train.run_folder import CONFIG_FILE
from edm2.train.world import World, join_world

_GENERATED = 1000  # images of a model, unless told
# Where two results differ in one of these, their numbers cannot be compared.
_MUST_AGREE = (
    "extractor",
    "reference.sha256",
    "reference.images.fingerprint",
    "settings",
    "images.num_images",
    "images.shape",
)


@dataclass(kw_only=True)
class _Options:
    extractor: Literal["inception", "dinov2", "classifier"] | None = None
    """Feature extractor. Default: the reference's; for a new reference, a classifier trained on its labels."""
    weights: str | None = None
    """Weights of the extractor: a file or http(s) address (inception, classifier), a folder or hub name (dinov2)."""
    weights_sha256: str | None = None
    """Expected sha256 of the weights. Required for inception, whose TorchScript file contains code that runs."""
    trust_weights: bool = False
    """Open a TorchScript file without checking its hash."""
    split: str = "train"
    """Split to measure, if the source has several."""
    num: int | None = None
    """Number of images to measure, chosen at random. Default: all; of a model, 1,000 from the first seeds."""
    keep: int = KEPT_FEATURES
    """Number of random images whose features are kept, for all numbers but the Frechet distance; 0 for none."""
    seed: int = 0
    """Seed of these choices, of subsets, and of a classifier's training."""
    batch: int = 100
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. torchrun spreads the images over several processes."""

    def how(self, world: World) -> Measuring:
        """Return what measuring needs of the options."""
        return Measuring(keep=self.keep, seed=self.seed, batch=self.batch, world=world)

    def open(self, source: str, num_classes: int | None = None) -> ImageSet:
        """Open images to measure."""
        return open_images(source, split=self.split, num_classes=num_classes, count=self.num, seed=self.seed)


_Shared = Annotated[_Options, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class _Ref:
    """Measure a data set once, so that images can be scored against it."""

    data: Annotated[str, tyro.conf.Positional]
    """Images: a built-in name, or a folder, ZIP or array file."""
    out: Path
    """Reference file to write, .safetensors. A classifier is written next to it."""
    options: _Shared = field(default_factory=_Options)


@dataclass(kw_only=True)
class _Score:
    """Score images against a reference."""

    images: Annotated[str, tyro.conf.Positional]
    """A folder of samples, or anything that `edm2 metrics ref` takes. A run or model file is measured without saving
    its images, with the settings that `edm2 sample` has for it."""
    ref: Path
    """Reference: a file of `edm2 metrics ref`, an official .pkl (nothing in it is run), an .npz with mu and sigma, or
    the file that `edm2 import` made from one of these."""
    metric: str | None = None
    """Statistics to use of an official file: fid or fd_dinov2. Default: fid, if the file holds both."""
    training: str | None = None
    """The model's training images, to check the samples for copies. A picture of the closest pairs is written next to
    the numbers."""
    held_out: str | None = None
    """For the check for copies: images of the same kind that the model has not seen (their split test, if there is
    one). Default: training images, each compared with the others."""
    ema: float | None = None
    """EMA length to reconstruct, if a run is measured. Default: the tuned model, or the one that the run saved."""
    out: Path | None = None
    """JSON file for the numbers. Default: next to the images."""
    options: _Shared = field(default_factory=_Options)


@dataclass(kw_only=True)
class _Compare:
    """Compare two sets of images or references, or two results of `edm2 metrics`."""

    a: Annotated[str, tyro.conf.Positional]
    """Images or a reference file that count as real; or a result, .json."""
    b: Annotated[str, tyro.conf.Positional]
    """Images or a reference file that count as generated; or a result, .json."""
    out: Path | None = None
    """JSON file for the numbers. Default: A-vs-B.metrics.json in the current folder."""
    options: _Shared = field(default_factory=_Options)


def ref(prog: str, words: Sequence[str]) -> None:
    """`edm2 metrics ref`."""
    chosen = tyro.cli(_Ref, prog=prog, args=list(words))
    options, out = chosen.options, chosen.out
    _check(options)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors, which marks a reference")
    with join_world(options.device) as world:
        images = options.open(chosen.data)
        beside = _classifier_beside(out)
        fits = options.extractor in (None, "classifier") and options.weights is None
        extractor: FeatureExtractor
        if not fits:
            extractor = _open(options, None, world)
        elif out.exists():
            extractor = ClassifierFeatures.load(beside)
        else:
            extractor = fit_classifier_beside(images, beside, options.how(world))
        provenance = provenance_of(
            images.provenance, describe_extractor(extractor), keep=options.keep, seed=options.seed
        )
        if out.exists():
            differing = differences(Reference.load(out).provenance, provenance)
            if differing:
                raise ValueError(
                    f"{out} holds a reference of other settings ({', '.join(differing)} differ): choose another --out"
                )
            return _say(world, f"{out} holds this reference already")
        try_extractor(extractor, images)
        made = options.how(world).measure(images, extractor)
        if world.is_first:
            if fits and isinstance(extractor, ClassifierFeatures):
                extractor.save(beside)
            Reference(statistics=made.statistics, features=made.features, provenance=provenance).save(out)
        count = f"{len(images.dataset):,} images"
        _say(world, f"{out}: {count}, {extractor.num_features:,} features by {extractor.name}")


def score(prog: str, words: Sequence[str]) -> None:
    """`edm2 metrics score`."""
    chosen = tyro.cli(_Score, prog=prog, args=list(words))
    options = chosen.options
    _check(options)
    if chosen.out is None and "://" in chosen.images:
        raise ValueError(f"the numbers cannot be written next to {chosen.images}: give --out with a file")
    with join_world(options.device) as world:
        real = Side(found=read_reference(chosen.ref, metric=chosen.metric), where=str(chosen.ref))
        found = _samples(chosen, world)
        if found is None:
            found = options.open(chosen.images, real.num_classes)
        made = Side(found=found, where=chosen.images)
        out = chosen.out or Path(f"{chosen.images.rstrip('/')}.metrics.json")
        copies = None if chosen.training is None else CopySources.open(chosen.training, chosen.held_out)
        if copies is None and chosen.held_out is not None:
            raise ValueError(
                f"--held-out {chosen.held_out} is for the check for copies: give --training, too"
            )
        _tell(score_sides(real, made, _open(options, real, world), out, options.how(world), copies), out)


def _samples(chosen: _Score, world: World) -> ImageSet | None:
    """The images of a run or model, made when they are measured; None for anything else."""
    path = Path(chosen.images)
    is_folder = (path / MODEL_FILE).is_file() or (path / CONFIG_FILE).is_file()
    if not is_folder and not (path.is_file() and path.suffix == ".safetensors"):
        if chosen.ema is not None:
            raise ValueError(f"--ema {chosen.ema:g} is for a run, and {path} is not one: leave it out")
        return None
    model = open_pretrained(path, chosen.ema, device=world.device)
    seeds = range(_GENERATED if chosen.options.num is None else chosen.options.num)
    return generated_set(GeneratedImages(model.generator, seeds, **model.settings()), chosen.images, seeds)


def compare(prog: str, words: Sequence[str]) -> None:
    """`edm2 metrics compare`."""
    chosen = tyro.cli(_Compare, prog=prog, args=list(words))
    options, names = chosen.options, (chosen.a, chosen.b)
    _check(options)
    if any(name.endswith(".json") for name in names):
        if not all(name.endswith(".json") for name in names):
            raise ValueError(f"{chosen.a} and {chosen.b}: compare a result (.json) with another result")
        return _compare_results(read_result(Path(chosen.a)), read_result(Path(chosen.b)))
    with join_world(options.device) as world:
        real = _side(chosen.a, options, None)
        made = _side(chosen.b, options, real.num_classes)
        known = [side for side in (real, made) if isinstance(side.found, Reference)]
        extractor = None if len(known) == 2 else _open(options, known[0] if known else None, world)
        stems = [Path(name.rstrip("/")).stem for name in names]
        out = chosen.out or Path(f"{stems[0]}-vs-{stems[1]}.metrics.json")
        _tell(score_sides(real, made, extractor, out, options.how(world)), out)


def _side(name: str, options: _Options, num_classes: int | None) -> Side:
    if is_reference(name):
        return Side(found=read_reference(name), where=name)
    return Side(found=options.open(name, num_classes), where=name)


def _tell(scored: tuple[dict[str, Any] | None, bool], out: Path) -> None:
    result, is_old = scored
    if result is not None:
        _print_result(result, f"{out} already contains these numbers" if is_old else f"written to {out}")


def _compare_results(a: dict[str, Any], b: dict[str, Any]) -> None:
    show(f"{'':<28} {'A':>12} {'B':>12}")
    for name in SCORE_NAMES:
        values = " ".join(_text(result["scores"].get(name)) for result in (a, b))
        show(f"{name.replace('_', ' '):<28} {values}")
    differing = differences(without_numbers(a), without_numbers(b))
    if differing:
        show(f"other settings: {', '.join(differing)}")
    wrong = [name for name in differing if name.startswith(_MUST_AGREE)]
    if wrong:
        warnings.warn(
            f"these numbers cannot be compared: {', '.join(wrong)} differ between them", stacklevel=2
        )


def _print_result(result: dict[str, Any], note: str) -> None:
    extractor = result["extractor"]
    for label, images in (("images", result["images"]), ("reference", result["reference"]["images"])):
        count = images.get("num_images")
        show(f"{label:<10} {images['source']}: {f'{count:,}' if count is not None else 'number not known'}")
    sha256 = (extractor.get("sha256") or "")[:16] or "(weights not known)"
    show(f"extractor  {extractor['name']} {sha256}, {extractor['num_features']:,} features")
    scores = {name: result["scores"].get(name) for name in SCORE_NAMES}
    copies = {name: result["scores"][name] for name in COPY_NAMES if name in result["scores"]}
    for name, value in (scores | copies).items():
        show(f"{name.replace('_', ' '):<28} {_text(value)}")
    if scores["kernel_distance"] is None:
        show("- needs the features of single images, which one of the two sets does not keep")
    elif scores["kernel_distance_spread"] is None:
        show("- no spread: both sets are so small that every subset is the whole set")
    show(note)


def _say(world: World, text: str) -> None:
    if world.is_first:
        show(text)


def _text(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.6g}':>12}"


def _check(options: _Options) -> None:
    for name, least in (("keep", 0), ("batch", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least {least}")
    if 0 < options.keep < MIN_IMAGES:
        raise ValueError(f"--keep {options.keep} must be 0 or at least {MIN_IMAGES}")


def _open(options: _Options, known: Side | None, world: World) -> FeatureExtractor:
    """The extractor that is asked for, or that a reference was made with."""
    name: str | None = options.extractor
    if known is not None:
        wanted = known.found.provenance["extractor"]["name"]
        if name not in (None, wanted):
            raise ValueError(f"{known.where} was measured by {wanted}: leave --extractor {name} out")
        name = wanted
    name, weights = name or "classifier", options.weights
    if name == "classifier" and weights is None:
        if known is None:
            raise ValueError(
                "which extractor? give --extractor, or --weights with a classifier that `edm2 metrics ref` trained, or "
                "compare with a reference file"
            )
        weights = str(_classifier_beside(Path(known.where)))
    if name not in EXTRACTORS:
        raise ValueError(
            f"{known.where if known else ''} was measured by {name!r}, which only its owner's code can load: use "
            "edm2.metrics.score in Python"
        )
    return open_extractor(
        name, weights, sha256=options.weights_sha256, trust=options.trust_weights, device=world.device
    )


def _classifier_beside(out: Path) -> Path:
    return out.with_name(f"{out.stem}-classifier.safetensors")
