"""Kills a small training run over and over, from a process that has everything imported already.

Usage: kill_worker.py FOLDER KILLS. Writes FOLDER/undisturbed and FOLDER/killed-N, prints facts as JSON.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny_run import tiny_config, tiny_data

from edm2.train import train

CONFIG = tiny_config(num_images=480, checkpoint_images=24, snapshot_images=48, keep_checkpoints=3)
DATA = tiny_data()


def start(out: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(CONFIG, out, dataset=DATA, quiet=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def finished(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    assert status == 0, f"a run failed with status {status}"
    return done == child


def being_written(out: Path) -> set[int]:
    """Folders of checkpoints that are not whole yet, by inode."""
    found = set()
    for path in (out / "checkpoints").glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed just now
            found.add(path.stat().st_ino)
    return found


def kill_once(out: Path, *, delay: float, while_writing: bool) -> tuple[bool, bool]:
    """Start or continue a run and kill it; whether it was still running, and writing a checkpoint."""
    left = being_written(out)
    child = start(out)
    begin = time.monotonic()
    while time.monotonic() < begin + delay or (while_writing and not being_written(out) - left):
        if finished(child):
            return False, False
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1]), bool(being_written(out) - left)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what is written survives a kill without it, and the test is faster
    rng = random.Random(0)
    # In this process, so that its children find everything imported and warm.
    train(CONFIG, folder / "warm", dataset=DATA, quiet=True)
    begin = time.monotonic()
    train(CONFIG, folder / "undisturbed", dataset=DATA, quiet=True)
    whole = time.monotonic() - begin
    done = in_writing = rounds = 0
    out = folder / "killed-0"
    while done < kills:
        killed, writing = kill_once(out, delay=rng.uniform(0, whole / 10), while_writing=done % 2 == 1)
        done += killed
        in_writing += writing
        if not killed:
            rounds += 1
            out = folder / f"killed-{rounds}"
    child = start(out)
    while not finished(child):
        time.sleep(0.01)
    print(json.dumps({"kills": done, "in_writing": in_writing, "runs": rounds + 1, "seconds": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
