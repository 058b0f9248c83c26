"""Averages and checkpoints on disk.

`manifest` and `snapshots`: a folder of snapshots, whole after any kill. `encoding`, `tensorfile`, `data_sum`: one
average in one file. `weighted_sums`, `distances`: many files read side by side. `thinning`, `verify`, `locking`,
`replacing`: care of a folder. `checkpoint_files`, `shards`, `torch_file`: models that others wrote. `guarded_json`:
JSON from strangers.
"""
