"""What has to be said of weights that others released."""

from pathlib import Path

from edm2.files import write_atomic

LICENCE = "CC BY-NC-SA 4.0"
NOTICE_FILE = "LICENSE-NOTICE"
NOTICE_LINE = (
    f"weights of the official release are under {LICENCE}: not for commercial use, credit the authors, share what you"
    " make of them under the same licence"
)
NOTICE = f"""\
The files in this folder were converted by edm2 from files in the format of the official release of

    Tero Karras, Miika Aittala, Jaakko Lehtinen, Janne Hellsten, Timo Aila, Samuli Laine:
    Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv:2312.02696)

The weights and statistics of that release belong to its authors and are licensed under Creative Commons
Attribution-NonCommercial-ShareAlike 4.0 International ({LICENCE}):

    https://creativecommons.org/licenses/by-nc-sa/4.0/

Only their container was changed, from a Python pickle to safetensors. The licence stays with them, and with all that
is made from them, such as reconstructed averages or fine-tuned networks; keep this notice with them. The Apache-2.0
licence of edm2 covers edm2's own code only, not these weights.

Files that come from a training of your own are yours; this notice does not concern them.
"""


def write_notice(folder: str | Path) -> None:
    """Put the notice next to converted files.

    Raises:
        FileExistsError: If a file of its name says something else.
    """
    path = Path(folder) / NOTICE_FILE
    if not path.exists():
        write_atomic(path, NOTICE.encode())
    elif path.read_text(encoding="utf-8") != NOTICE:
        raise FileExistsError(
            f"{path} exists already and says something else: choose another --out or move it away"
        )
