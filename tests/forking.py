"""A Python whose processes start at once: they are forked from one that has torch and Lightning imported.

Most of what a test process costs is those imports. ``python()`` is the path of a program that is called as Python is,
with ``-m MODULE``, ``-c CODE`` or a file: arguments, environment, directory, output, signals and exit status are those
of a new process, and what it starts through ``sys.executable`` is started so too.

The first call in a session starts a server. It imports ``IMPORTS`` and nothing of this repository, runs nothing else,
has one thread, and forks for each request. It ends, with every process that it forked, when the session does. Where
forking can't give what is asked for (other options of Python, another value of a variable that is read when Python
starts or a library is imported) the program becomes the real Python; so it does with FORKING=0.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
import uuid
from pathlib import Path
from typing import Any

__all__ = ["python"]

IMPORTS = ["lightning.pytorch.cli", "sklearn.datasets", "torchmetrics.classification"]
IMPORTS += ["torch._inductor.compile_fx", "torch.distributed.fsdp"]  # DeepSpeed imports the first, and takes long to
EARLY = ("PYTHON", "LANG", "LC_", "LD_", "TZ", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MPL", "POSSIBLE_USER")
EARLY += ("CUDA_", "DS_", "TORCH_", "PYTORCH_")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

ENVIRONMENT = dict(os.environ)  # before a test changes it
# The process that lives as long as the session: of several test processes the one that started them.
OWNER = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
FOLDER = Path(tempfile.gettempdir()) / f"forking-{os.environ.get('PYTEST_XDIST_TESTRUNUID', uuid.uuid4().hex)}"


def python(hash_seed: int | None = None) -> str:
    """The path of the program; there is a server for each PYTHONHASHSEED."""
    if sys.platform != "linux" or os.environ.get("FORKING") == "0":
        return sys.executable
    folder, environment = FOLDER / str(hash_seed), {**ENVIRONMENT, "PYTHONPATH": ""}
    if hash_seed is not None:
        environment["PYTHONHASHSEED"] = str(hash_seed)
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            command = [sys.executable, __file__, "serve", str(folder), str(OWNER)]
            subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)
            command = [sys.executable, "-IS", __file__, "call", str(folder), sys.executable]
            program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            program.chmod(0o755)
    return str(program)


def call(folder: Path, real: str, arguments: list[str]) -> None:
    """What the program does: have a process forked, pass signals on to it, and end as it ends."""
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(str(folder / "socket"))
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        for number in SIGNALS:
            signal.signal(number, lambda number, _: server.send(bytes([number])))
        answer = server.recv(16).decode()
    if answer == "real":
        os.execv(real, [real, *arguments])
    if not answer:
        sys.exit(f"The process that forks for tests is gone: see {folder / 'log'}.")
    if (status := int(answer)) < 0:
        with contextlib.suppress(OSError):  # of SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(folder: Path, owner: int) -> None:
    """Import, then fork for each request until the owner has ended; returns in a process that is to run its request."""
    del sys.path[0]  # where this file is
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(100)
        if os.fork():
            os._exit(0)  # requests can come
        os.setsid()
        with (folder / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        for name in IMPORTS:
            importlib.import_module(name)
        sys.stdout.flush()
        gc.collect()
        gc.freeze()  # or every process would copy all of it when it collects garbage
        assert len(os.listdir("/proc/self/task")) == 1, "it has a thread, which a forked process would miss"
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that keep the processes
        gone = os.pidfd_open(owner)
        while gone not in select.select([listener, gone], [], [])[0]:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError, ValueError):  # of one that was killed while it asked
                _, files, _, _ = socket.recv_fds(connection, 1, 3)
                with connection.makefile("rb") as stream:
                    request = json.loads(stream.readline())
                if not can_fork(request):
                    connection.sendall(b"real")
                elif os.fork() == 0:
                    keep(connection, gone)
                    break
            for file in files:
                os.close(file)
        else:
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # there are other servers
                folder.parent.rmdir()
            return
    os.close(gone)
    become(request, files, folder / "python")


def can_fork(request: dict[str, Any]) -> bool:
    """Whether a process that is forked is what was asked for."""
    asked = request["environment"]
    early = {name for name in asked.keys() | ENVIRONMENT.keys() if name.startswith(EARLY) and name != "PYTHONPATH"}
    # the imports set some that were not there
    same = all(asked.get(name) in (ENVIRONMENT.get(name), os.environ.get(name)) for name in early)
    option = request["arguments"][0] if request["arguments"] else "-i"
    return same and (option in ("-m", "-c") or not option.startswith("-"))


def keep(connection: socket.socket, gone: int) -> None:
    """Fork the process, in which this returns; pass signals on to it, and its exit status back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        return
    ended = os.pidfd_open(process)
    while ended not in (ready := select.select([ended, connection, gone], [], [])[0]):
        message = connection.recv(1) if connection in ready else b""
        if message:
            os.kill(process, message[0])
            continue
        for kill in (os.kill, os.killpg):  # nobody is left who wants it
            with contextlib.suppress(ProcessLookupError):
                kill(process, signal.SIGKILL)
        break
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict[str, Any], files: list[int], program: Path) -> None:
    """Make this process what is asked for, and run it."""
    import numpy as np
    import torch
    import torchmetrics.utilities.prints
    from lightning.fabric.utilities import rank_zero

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(request["directory"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    environment, arguments = request["environment"], request["arguments"]
    set_by_imports = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    os.environ.clear()
    os.environ.update({**set_by_imports, **environment})
    # what the imports took from the environment, or drew; `random` is seeded anew by itself
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    torchmetrics.utilities.prints.rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))
    np.random.seed()
    torch.default_generator.seed()
    tempfile.tempdir = None
    sys.executable, sys.orig_argv = str(program), [str(program), *arguments]
    first = {"-m": request["directory"], "-c": ""}.get(arguments[0], os.path.dirname(os.path.realpath(arguments[0])))
    more = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *dict.fromkeys([*more, *sys.path])]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-m":
        sys.argv = ["-m", *arguments[2:]]
        runpy._run_module_as_main(arguments[1])  # what Python itself does
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, main.__file__ = arguments, os.path.abspath(arguments[0])
        exec(compile(Path(arguments[0]).read_bytes(), arguments[0], "exec"), vars(main))


if __name__ == "__main__":
    task, folder, *rest = sys.argv[1:]
    if task == "serve":
        serve(Path(folder), int(rest[0]))
    else:
        call(Path(folder), rest[0], rest[1:])
