"""Averages and checkpoints on disk.

`manifest` and `snapshots`: a folder of snapshots, whole after any kill. `encoding`, `tensorfile`: one average in one
file. `weighted_sums`: many files read side by side. `replacing`: files and folders that are whole or not there.
`checkpoint_files`, `shards`: models that others wrote. `guarded_json`: JSON from strangers.
"""
