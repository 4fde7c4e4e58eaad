"""Starts `ldm` commands for tests as real processes, without the seconds that importing takes each time.

One process imports everything and then forks for each command that it is given on stdin; run as a script.
"""

import json
import os
import signal
import sys
import threading


def _child(request: dict) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    if request["file_size"] is not None:  # what a full disk does, to files above this size
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    if request["die_at"] is not None:
        _die_at(*request["die_at"])
    sys.argv = [request["script"], *request["arguments"]]
    from ldm.cli import run_verb

    code = 1
    try:
        run_verb("train", program="train.py")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(event: str, ending: str) -> None:
    """End this process as `kill -9` does, just before it opens, or renames to, a name with this ending."""

    def hook(name: str, args: tuple) -> None:
        if name == event and str(args[1 if event == "os.rename" else 0]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _tell(lock: threading.Lock, **message) -> None:
    with lock:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def _wait(lock: threading.Lock, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    _tell(lock, pid=pid, code=os.waitstatus_to_exitcode(status))


def serve() -> None:
    import ldm.cli.train
    import ldm.training.loop.fit
    import ldm.training.trial  # noqa: F401

    lock = threading.Lock()
    for line in sys.stdin:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        _tell(lock, started=pid)
        threading.Thread(target=_wait, args=(lock, pid), daemon=True).start()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    serve()
