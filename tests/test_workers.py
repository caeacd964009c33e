"""Worker processes: order, errors, and an end without leftovers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_beyond.errors import UserError
from moe_beyond.workers import map_in_order

# Builtins, because a worker cannot import a test module.
LATER_ITEMS_ARE_FASTER = "(__import__('time').sleep(0.2 / n), n * n)[1]"


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_the_order_of_the_items(workers: int) -> None:
    items = [{"n": number} for number in range(1, 9)]
    assert list(map_in_order(eval, LATER_ITEMS_ARE_FASTER, items, workers)) == [n * n for n in range(1, 9)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_arrives(workers: int) -> None:
    source = "from moe_beyond.errors import UserError\nif n == 2: raise UserError('shard 2: is damaged')"
    with pytest.raises(UserError, match=r"^shard 2: is damaged$"):
        list(map_in_order(exec, source, [{"n": n} for n in range(4)], workers))


def test_a_killed_worker_is_one_line() -> None:
    source = "__import__('os').kill(__import__('os').getpid(), 9)"
    with pytest.raises(UserError, match=r"^--workers: a worker was killed, perhaps for its memory; use fewer workers$"):
        list(map_in_order(eval, source, [{}], 2))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    source = f"open('{tmp_path}/' + str(__import__('os').getpid()), 'w'), __import__('time').sleep(60)"
    script = f"from moe_beyond.workers import map_in_order; list(map_in_order(eval, {source!r}, [{{}}] * 4, 2))"
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    if how is signal.SIGINT:
        os.killpg(parent.pid, how)  # a terminal sends Ctrl-C to all processes
    else:
        parent.kill()
    _, messages = parent.communicate(timeout=20)
    assert messages.count("Traceback") == (how is signal.SIGINT)  # the parent's only
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
