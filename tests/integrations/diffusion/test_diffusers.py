"""diffusers' U-Net behind our preconditioning, as docs/own_network.md does it: trained, resumed, sampled, tuned."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from edm2.cli import main
from edm2.diffusion import own_network
from edm2.ema.storage.manifest import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of the library
DOCS = Path(__file__).parents[3] / "docs"
SHORT = "--images 96 --batch 16 --snapshot-images 32 --checkpoint-images 32 --log-images 32 --device cpu"


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = next(DOCS.rglob("own_network.md")).read_text()
    code = re.search(r"```python\n(from diffusers.*?)```", page, re.DOTALL)
    assert code is not None
    Path("my_network.py").write_text(code[1].replace("(32, 64)", "(8, 16)"))
    own = "--network-from my_network:make"
    train = f"train --preset digits {SHORT} {own} --optimizer.ref-lr 3e-4 --network.dropout 0"
    main(f"{train} --out whole".split())
    main(f"{train} --out pieces".split())
    shutil.rmtree("pieces/checkpoints/000000000096")  # as if killed after the checkpoint before
    Path("pieces/model.safetensors").unlink()
    main(f"{train} --out pieces".split())
    assert files(Path("pieces")) == files(Path("whole"))
    assert len(read_manifest(Path("whole/snapshots")).snapshots) == 6

    own_network._registered.clear()
    main(f"sample whole --ema 0.07 --seeds 0-3 --num-steps 2 --out samples {own}".split())
    assert Path("samples/grid.png").exists()
    search = "--sigma-rels 0.05 0.1 --guide-moments 0.5 --guide-factors 1 --guidances 2 --highs 8 --lows 0.5"
    sizes = "--samples 16 --final-samples 16 --repeats 2 --num-steps 2 --sampler euler --device cpu"
    main(f"tune whole {search} {sizes} {own}".split())
    assert Path("whole/tuning/tuned.json").exists()
    main(f"report whole --out report.html {own}".split())
    assert Path("report.html").exists()
