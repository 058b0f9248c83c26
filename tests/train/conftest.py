"""Makes `tiny_run` importable for the tests here, as it is for the scripts that they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
