"""Description that a saved model carries of a network from the official release."""

from typing import Any

from edm2.data import FloatCoding, PixelCoding
from edm2.interop.licence import LICENCE, NOTICE_LINE
from edm2.interop.network_file import NetworkFile
from edm2.train.coding import Coding

# Per channel, of the latents of the released models' autoencoder. Ref: docs/data.md.
LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
LATENT_STD = (4.17, 4.62, 3.71, 3.28)


def model_info(network: NetworkFile) -> dict[str, Any]:
    """Coding of the images and licence, as JSON values for `edm2.diffusion.save_model`.

    Args:
        network: As read from its file. Images of a network with four channels whose encoder is not that of
            RGB pixels are latents of the released models' autoencoder; of other encoders nothing is said.
    """
    channels, sigma_data = network.options["img_channels"], network.options["sigma_data"]
    info: dict[str, Any] = {"license": LICENCE, "license_notice": NOTICE_LINE}
    coding = None
    if network.encoder == "StandardRGBEncoder":
        # x / 127.5 - 1 enters the network as it is.
        coding = Coding(
            kind="pixels", values=PixelCoding(std=(sigma_data,), sigma_data=sigma_data), num_channels=channels
        )
    elif network.encoder is not None and channels == len(LATENT_MEAN):
        values = FloatCoding(mean=LATENT_MEAN, std=LATENT_STD, sigma_data=sigma_data)
        coding = Coding(kind="latents", values=values, num_channels=channels)
    return info if coding is None else {**info, "coding": coding.to_json()}
