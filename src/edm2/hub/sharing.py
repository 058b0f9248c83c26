"""Saving models in the form in which the Hugging Face hub keeps them; `EDM2Pipeline` loads and uploads them."""

from collections.abc import Sequence
from pathlib import Path

from edm2.files import write_atomic
from edm2.generate import ImageGenerator
from edm2.hub.model_card import model_card
from edm2.hub.pretrained import CARD_FILE, Pretrained, open_pretrained, write_pretrained


def save_pretrained(
    model: str | Path | ImageGenerator | Pretrained,
    folder: str | Path,
    *,
    sigma_rel: float | None = None,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a model as a folder of safetensors, settings and a card, ready to be uploaded.

    Args:
        model: a run, with what `edm2 tune` found where it was tuned; a model file; the settings of a released
            model that `edm2 import` wrote; or a model in memory.
        folder: where to.
        sigma_rel: EMA length to put together from a run's snapshots instead.
        results: files that `edm2 metrics score` wrote about this model's images, for the card.
        license: identifier as the hub lists them, such as `apache-2.0`. Weights that carry a licence keep it.
        repo_id: `owner/name` for the example in the card; default: the folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: if it holds a model already.
        ValueError: as in `open_pretrained`.
    """
    if isinstance(model, (str, Path)):
        model = open_pretrained(model, sigma_rel, results=results, license=license)
    elif sigma_rel is not None or results or (license is not None and isinstance(model, Pretrained)):
        raise ValueError(
            "sigma_rel, results and the licence are for models that are opened here: give a path, or build a Pretrained"
        )
    elif isinstance(model, ImageGenerator):
        model = Pretrained(model, license=license)
    folder = write_pretrained(model, folder)
    write_atomic(folder / CARD_FILE, model_card(model, repo_id or str(folder)).encode())
    return folder
