"""Other people's files, read without running anything in them: the official release, other libraries' averages."""

from edm2.interop.ema_folders import open_ema_folder

__all__ = ["open_ema_folder"]
