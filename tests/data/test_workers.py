import os
import signal
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
