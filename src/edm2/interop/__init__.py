"""Other people's files: the official release, read without running anything in it."""
