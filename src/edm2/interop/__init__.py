"""Other people's files, read without running anything in them.

- `open_ema_folder`: averages that other libraries wrote (`ema_folders`).
- `nvlabs`: the public names for files of the official release: networks, snapshots and reference statistics.
- `pickle_reader`, `pickle_values`, `pickle_file`: pickles as data.
- `network_file`, `snapshot_folder`, `reference`: what those pickles hold.
- `fetch`, `convert`, `released`, `licence`, `model_info`: `edm2 import`.
"""

from edm2.interop.ema_folders import open_ema_folder

__all__ = ["open_ema_folder"]
