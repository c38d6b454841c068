"""Ranks forked from one process that has imported the training code:
each starts at once, not after seconds of imports."""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    """Of a rank: kernels are not interpreted, a thread each."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def rank(variables: dict[str, str], streams: tuple[str, str], arguments: list[str]) -> None:
    """Run a script, or a module after -m, as ``__main__``."""
    os.environ.update(variables)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def processes(count: int, *arguments: str, folder: Path, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a module or a script in ``count`` processes, with the variables that torch.distributed.run sets."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        CONTEXT.set_forkserver_preload(["lpo_fast.train_lpo"])
        multiprocessing.forkserver.ensure_running()
    streams, port = (str(folder / f"{count}.out"), str(folder / f"{count}.err")), str(free_port())
    started = []
    for n in range(count):
        variables = {} if count == 1 else {
            "RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(CONTEXT.Process(target=rank, args=(variables, streams, list(arguments)), daemon=True))
        started[-1].start()
    for process in started:
        process.join(timeout)
        if process.exitcode != 0:  # failed, or hangs: the others would wait for it
            for other in started:
                other.kill()
    stdout, stderr = (Path(path).read_text() for path in streams)
    return subprocess.CompletedProcess(arguments, max(process.exitcode != 0 for process in started), stdout,
                                       stderr)
