import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from edm2.data.workers import process_pool, result_of


def nothing():
    pass


def number():
    return os.getpid()


def test_a_killed_worker_is_an_error_and_an_interrupted_one_goes_on():
    pool = process_pool(1, nothing, grace=60.0)
    worker = result_of(pool.submit(number))
    os.kill(worker, signal.SIGINT)
    assert result_of(pool.submit(number)) == worker
    future = pool.submit(time.sleep, 60)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="a worker process was killed, often because memory ran out"):
        result_of(future)
    pool.shutdown(wait=True)


def test_a_terminated_worker_first_has_its_grace():
    with process_pool(1, nothing, grace=3.0) as pool:
        worker = result_of(pool.submit(number))
        os.kill(worker, signal.SIGTERM)
        assert result_of(pool.submit(number)) == worker
        with pytest.raises(ChildProcessError):
            result_of(pool.submit(time.sleep, 600))


PROGRAM = """
    import os, signal
    from edm2.data.workers import process_pool

    if __name__ == "__main__":
        pool = process_pool(1, os.getpid)
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_ends_with_its_parent(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for _ in range(200):
        if not is_alive(done.stdout.strip()):
            break
        time.sleep(0.05)
    assert not is_alive(done.stdout.strip())
