"""A pipeline as users of diffusers know them, on the Hugging Face hub; needs huggingface_hub.

It is not a subclass of diffusers' `DiffusionPipeline`, whose loader imports the modules that a repository's
model_index.json names and wants the weights in a layout of its own. Only safetensors and JSON are read, and
diffusers is needed for latents only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from edm2.data import LatentDecoder
from edm2.data.autoencoder import RELEASED_AUTOENCODER, PixelRange
from edm2.extras import needed
from edm2.generate.checks import check_decoder, check_inputs
from edm2.hub.folder import FILES, check_free, open_pretrained, write_pretrained
from edm2.hub.model_card import model_card
from edm2.hub.pretrained import Pretrained

with needed("edm2.hub.pipeline"):
    from huggingface_hub import HfApi, ModelCard, ModelHubMixin, snapshot_download
    from PIL import Image

OutputType = Literal["pil", "np", "pt", "latent"]
_PIL_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class EDM2PipelineOutput:
    """Result of a call of `EDM2Pipeline`.

    Attributes:
        images: A list of PIL images; or `[N, H, W, C]` float32 in [0, 1] for "np"; `[N, C, H, W]` for "pt". Of a
            model of floats, and latents for "latent": in the data's own units.
        seeds: Seed of each image; the same seed makes the same image again.
    """

    images: Any
    seeds: list[int]


class EDM2Pipeline(ModelHubMixin):
    """Images from a shared model: `EDM2Pipeline.from_pretrained(folder_or_id)(num_images=4).images`.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of huggingface_hub's `ModelHubMixin`.

    Args:
        model: See `edm2.hub.open_pretrained`.
        vae: AutoencoderKL of a latent model: its name, folder, or itself; loaded when it is first needed.
        pixel_range: Scale of the autoencoder's output, see `edm2.data.LatentDecoder`.

    Attributes:
        model: Networks, settings and results.
    """

    def __init__(
        self,
        model: Pretrained,
        *,
        vae: Any = RELEASED_AUTOENCODER,
        pixel_range: PixelRange = "zero-one",
    ) -> None:
        if model.generator.decoder is not None:
            raise ValueError("the generator has a decoder of its own: give the pipeline vae instead")
        self.model = model
        self._vae, self._pixel_range = vae, pixel_range
        self._decoder: LatentDecoder | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.model.generator.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> "EDM2Pipeline":
        """Move everything to a device; returns itself."""
        for part in (self.model.generator, self.model.guide, self._decoder):
            if part is not None:
                part.to(device)
        return self

    def __call__(
        self,
        num_images: int | None = None,
        *,
        class_labels: int | Sequence[int] | np.ndarray | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        images_at_once: int = 64,
        **options: Any,
    ) -> EDM2PipelineOutput | tuple[Any]:
        """Make images, with the saved settings for all that is not given.

        Args:
            num_images: Number of images. Default: that of labels, seeds or generators, else 1.
            class_labels: Class of all images or of each; vectors `[N, label_dim]` for a model that takes them.
                Default: chosen by the image's seed.
            generator: Source of the images' seeds; a list has one for each image. Default: random seeds.
            seeds: Seed of each image, instead of a generator.
            num_inference_steps: Noise levels.
            guidance_scale: Guidance weight; 1 for none.
            output_type: "pil", "np", "pt", or "latent" for a latent model's latents without decoding them.
            return_dict: False gives a tuple with the images alone.
            images_at_once: Images that pass through the network at a time; bounds the memory.
            **options: `sampler`, `interval`, `conditions` and `vectors` of `edm2.generate.ImageGenerator.images`.

        Raises:
            ValueError: For inputs that do not fit the model or each other, before any work.
        """
        latent = self._check_output(output_type)
        conditions, vectors = options.get("conditions"), options.get("vectors")
        seeds = None if seeds is None else [int(seed) for seed in np.ravel(np.asarray(seeds))]
        count = _count(
            num_images,
            class_labels=class_labels,
            generators=generator,
            seeds=seeds,
            conditions=conditions,
            vectors=vectors,
        )
        if seeds is None:
            seeds = _drawn(count, generator)
        elif generator is not None:
            raise ValueError("generator and seeds exclude each other: give one")
        labels = class_labels
        if labels is not None:
            labels = np.full(count, labels) if np.ndim(labels) == 0 else np.asarray(labels)
        check_inputs(self.model.generator, count, labels, conditions, vectors)
        settings = {"num_steps": num_inference_steps, "guidance": guidance_scale}
        given = {**{key: v for key, v in settings.items() if v is not None}, **options}
        decoder = None if latent else self._get_decoder()
        made = torch.from_numpy(self.model.images(seeds, labels, batch_size=images_at_once, **given))
        if decoder is not None:
            made = decoder(made.to(self.device)).cpu()
        images = _converted(made, "pt" if latent else output_type)
        return EDM2PipelineOutput(images, seeds) if return_dict else (images,)

    def _check_output(self, output_type: str) -> bool:
        generator = self.model.generator
        kind, channels = generator.coding.kind, generator.denoiser.img_shape[0]
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type {output_type!r}: there are {', '.join(get_args(OutputType))}")
        if output_type == "latent" and kind != "latents":
            raise ValueError(f"output_type 'latent' is for latent models, and this one makes {kind}")
        if output_type == "pil" and (
            kind == "floats" or (kind == "pixels" and channels not in _PIL_CHANNELS)
        ):
            raise ValueError(f"{kind} of {channels} channels are not pictures: give output_type='np' or 'pt'")
        return output_type == "latent"

    def _get_decoder(self) -> LatentDecoder | None:
        """The decoder of a latent model; None for other models."""
        generator = self.model.generator
        if generator.coding.kind != "latents":
            return None
        if self._decoder is None:
            if isinstance(self._vae, (str, Path)):
                decoder = LatentDecoder.load(self._vae, device=self.device, pixel_range=self._pixel_range)
            else:
                decoder = LatentDecoder(self._vae.to(self.device).eval(), pixel_range=self._pixel_range)
            check_decoder(decoder, generator.coding)
            self._decoder = decoder
        return self._decoder

    # Below: methods of huggingface_hub's mixin, and those that it leaves to the class.

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vae: Any = RELEASED_AUTOENCODER,
        pixel_range: PixelRange = "zero-one",
        device: torch.device | str = "cpu",
        dtype: str | torch.dtype = "float32",
        compile: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> "EDM2Pipeline":
        """Open a folder, or a repository of the hub, of which only our own files are downloaded.

        Args:
            pretrained_model_name_or_path: `owner/name`; or a folder of `save_pretrained` or of a run.
            vae: As for the class.
            pixel_range: As for the class.
            device: This, dtype and compile are those of `ImageGenerator.load`.
            dtype: Precision of the network.
            compile: Use torch.compile.
            revision: Branch, tag or commit of the repository.
            cache_dir: This and the following options are those of huggingface_hub's `snapshot_download`.
            force_download: Download although the cache has it.
            local_files_only: Use only the cache.
            token: For a private repository.

        Raises:
            ValueError: As in `open_pretrained`, or if neither such a folder nor such a repository exists.
        """
        # The mixin's own takes arguments from the downloaded config.json, and downloads that file at another revision.
        folder = pretrained_model_name_or_path
        if not Path(folder).is_dir():
            try:
                folder = snapshot_download(
                    str(folder),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=list(FILES),
                )
            except OSError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"{folder} is not a folder here, and the hub did not provide it ({reason}): "
                    "check the name, the network and, for a private repository, your login"
                ) from error
        model = open_pretrained(folder, device=device, dtype=dtype, compile=compile)
        return cls(model, vae=vae, pixel_range=pixel_range)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """Write networks, settings and card into a folder, as `edm2.hub.save_pretrained` does.

        Args:
            save_directory: The folder.
            **options: The mixin's: push_to_hub, repo_id and so on.

        Raises:
            FileExistsError: If it holds a model already.
        """
        check_free(save_directory)
        options["model_card_kwargs"] = {
            "name": str(save_directory),
            **(options.get("model_card_kwargs") or {}),
        }
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload as one commit.

        Args:
            repo_id: `owner/name`; created if it does not exist.
            **options: The mixin's: private, token, branch, commit_message and so on.

        Returns:
            The commit.
        """
        # The card's example needs the owner, too, which the hub knows if the caller left it out.
        api = HfApi(token=options.get("token"))
        repo_id = api.create_repo(repo_id=repo_id, private=options.get("private"), exist_ok=True).repo_id
        options["model_card_kwargs"] = {**(options.get("model_card_kwargs") or {}), "name": repo_id}
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *, name: str = "model") -> Any:
        """The card, see `edm2.hub.model_card.model_card`."""
        return ModelCard(model_card(self.model, name))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_pretrained(self.model, save_directory)


def _count(num_images: int | None, **others: Any) -> int:
    """Number of images on which all that was given agrees; one label or generator serves any number."""
    given = {} if num_images is None else {"num_images": num_images}
    given |= {name: len(value) for name, value in others.items() if np.ndim(value)}
    if len(set(given.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in given.items())
        raise ValueError(f"how many images? {told}: they must agree")
    count = next(iter(given.values()), 1)
    if count < 1:
        raise ValueError(f"{count} images: give at least 1")
    return count


def _drawn(count: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> list[int]:
    """Seeds from the generator, or one for each from its own."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()  # from the system, not from the process's shared numbers
    sources = [generator] * count if isinstance(generator, torch.Generator) else generator
    return [int(torch.randint(2**63 - 1, (), generator=g, device=g.device)) for g in sources]


def _converted(images: Tensor, output_type: str) -> Any:
    if output_type == "pil":
        arrays = [image.permute(1, 2, 0).numpy() for image in images]
        return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).contiguous().numpy()
