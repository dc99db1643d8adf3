"""Trainings in processes of their own, forked from one in which everything is imported: they start in no time."""

import os
import resource
import signal
import sys
import time
import traceback

from tests.support.forked_scripts import cache_all_programs

LIMIT_S = 400  # for any process to end


def start(config, workdir, *, file_limit=None):
    """Forks a training; its process id. What it prints goes to WORKDIR.log."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        _log_to(f"{workdir}.log")
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an OSError, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        status = _train(config, workdir)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _log_to(path):
    """Sends stdout and stderr to a file through a process of its own, which no limit on files concerns."""
    receive, send = os.pipe()
    if not os.fork():
        with open(path, "ab") as file:
            os.close(send)
            while data := os.read(receive, 65536):
                file.write(data)
        os._exit(0)
    os.close(receive)
    os.dup2(send, 1)
    os.dup2(send, 2)
    os.close(send)


def _train(config, workdir):
    """As train.py does it; the exit status."""
    from polaformer_jax.errors import Interrupted, UserError
    from polaformer_jax.training import loop, progress, runtime
    from polaformer_jax.training.signals import StopRequests

    cache_all_programs()
    try:
        with StopRequests() as stop:
            progress.set_up_logging()
            with runtime.session(config.distributed):
                loop.train(config, workdir, stop=stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except Interrupted as interrupted:
        return interrupted.status
    except RuntimeError as error:  # a data worker that died
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class Hang(Exception):
    pass


def wait(process, limit=LIMIT_S):
    """The exit status of a child; negative: the signal that ended it."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise Hang(f"a process did not end in {limit} s")
