"""Faults at random moments of short real trainings: every run ends as the undisturbed one, bit for bit.

    python -m tests.campaigns.faults --data-dir data --faults 150
    python -m tests.campaigns.faults --data-dir data --faults 50 --processes 2

A trial is a training of a tiny model in a work directory of its own, disturbed one to four times, each time started
again by the same call, and at last left alone. The faults: SIGKILL; SIGTERM; SIGTERM and a second signal; a disk that
takes no file above some size; files of the newest checkpoint truncated, emptied, removed, or with a flipped bit, after
a SIGKILL; a killed data worker (of one process). Each process must end with a status that the documentation allows, in
time; at the end parameters, optimizer and average equal those of the undisturbed run, and TensorBoard shows every step
once.

Programs are compiled once (JAX's cache on disk), and each process is forked from this one, in which everything is
imported but no device opened: so a fault costs seconds.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from tests.campaigns.processes import Hang, start, wait

STEPS = 24
ALLOWED = {
    "undisturbed": {0},
    "kill": {0, -signal.SIGKILL},
    "term": {0, 75},
    "term twice": {0, 75, 128 + signal.SIGTERM, 128 + signal.SIGINT},
    "disk": {0, 1},
    "damage": {0, -signal.SIGKILL},
    "worker": {0, 1},
}
KINDS = [kind for kind in ALLOWED if kind != "undisturbed"]
# Of several processes, those that have lost another: by an error of what they do together, or aborted by JAX.
PEER_LOST = {1, -signal.SIGABRT}
NOTHING_TO_SAVE = b"there was nothing to save"  # says a process that a signal ends before it has a state
MAY_LOSE_A_PEER = {"kill", "damage", "term twice", "disk"}


def settings(data_dir, *, workers=0, port=None, process=0, processes=1):
    from tests.support.recipes import digits as get_config

    config = get_config()
    config.update_from_flattened_dict(
        {
            "model.kernel_size": 1,
            "data.data_dir": str(data_dir),
            "data.workers": workers,
            "train.epochs": None,
            "train.steps": STEPS,
            "train.batch_size": 8,
            "schedule.warmup": 2.0,
            "eval.every": 6.0,
            "eval.batch_size": 180,
            "log.every": 5,
            "log.pictures": False,
            "checkpoint.every_steps": 4,
            "ema.decay": 0.9,
            "augment.mixup": 0.8,
        }
    )
    if processes > 1:
        config.distributed.coordinator = f"localhost:{port}"
        config.distributed.num_processes, config.distributed.process_id = processes, process
        config.distributed.heartbeat_s = 10
    return config


def damage(workdir, rng):
    """Does something to a file of the newest checkpoint."""
    steps = sorted((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()), reverse=True)
    if not steps:
        return
    files = sorted(p for p in (workdir / "checkpoints" / str(steps[0])).rglob("*") if p.is_file())
    if not files:
        return
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    how = rng.choice(["truncate", "empty", "remove", "flip", "all empty"])
    if how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "remove":
        path.unlink()
    elif how == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        for each in files:
            each.write_bytes(b"")


def disturb(kind, group, workdir, rng, longest):
    """Does to running processes what `kind` says, at a random moment."""
    time.sleep(rng.uniform(0, longest))
    victim = rng.choice(group)
    if kind in ("kill", "damage"):
        _send(victim, signal.SIGKILL)
    elif kind in ("term", "term twice"):
        _send(victim, signal.SIGTERM)
        if kind == "term twice":
            time.sleep(rng.uniform(0, 1))
            _send(victim, rng.choice([signal.SIGTERM, signal.SIGINT]))
    elif kind == "worker":
        deadline, workers = time.monotonic() + 10, []
        while not workers and time.monotonic() < deadline and Path(f"/proc/{victim}/task").exists():
            workers = _spawned(victim)
            time.sleep(0.02)
        if workers:
            _send(rng.choice(workers), signal.SIGKILL)


def _spawned(process):
    """Data workers among a process's children."""
    found = []
    with contextlib.suppress(OSError):  # they come and go
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            pids = [int(pid) for pid in children.read_text().split()]
            found += [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def _send(process, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(kind, args, workdir, rng, longest):
    """One start of a training, disturbed or not; the statuses of its processes."""
    port = free_port()
    limit = rng.choice([0, 1000, 10_000, 100_000, 1_000_000]) if kind == "disk" else None
    group = []
    for process in range(args.processes):
        config = settings(
            args.data_dir,
            workers=1 if kind == "worker" else 0,
            port=port,
            process=process,
            processes=args.processes,
        )
        group.append(start(config, workdir, file_limit=limit))
    if kind not in ("undisturbed", "disk"):
        disturb(kind, group, workdir, rng, longest)
    statuses = [wait(process) for process in group]
    if kind == "damage":
        damage(workdir, rng)
    return statuses


def final(workdir):
    """All arrays of the last checkpoint, by name, and what TensorBoard shows without the times."""
    from polaformer_jax.training.checkpoints import Checkpoints
    from polaformer_jax.training.experiment import Experiment
    from tests.support.runs import TIMES, written

    experiment = Experiment(settings(ARGS.data_dir))
    with Checkpoints(workdir / "checkpoints", keep_last=2, best_metric="accuracy", read_only=True) as checkpoints:
        state = checkpoints.restore(experiment.states.abstract).state
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
    numbers = written(workdir)
    shown = {name: values for name, values in numbers.items() if name not in TIMES}
    return arrays, shown | {name: [step for step, _ in numbers[name]] for name in TIMES}


def compare(wanted, found):
    """What differs, as text; empty if nothing does."""
    problems = [
        f"{name} differs"
        for name in wanted[0]
        if name not in found[0] or wanted[0][name].tobytes() != found[0][name].tobytes()
    ]
    problems += [f"TensorBoard: {name} differs" for name in wanted[1] if wanted[1][name] != found[1].get(name)]
    return "; ".join(problems[:3])


def in_child(function, *arguments):
    """Calls a function that opens devices in a process of its own (this one must stay without); its result."""
    import multiprocessing

    receive, send = multiprocessing.Pipe(False)
    child = os.fork()
    if not child:
        try:
            send.send(function(*arguments))
        except BaseException:
            traceback.print_exc()
            send.send(None)
        finally:
            os._exit(0)
    send.close()
    result = receive.recv()
    os.waitpid(child, 0)
    if result is None:
        raise RuntimeError(f"{function.__name__} failed")
    return result


def campaign(args):
    rng = random.Random(args.seed)
    kinds = [kind for kind in args.kinds if not (kind == "worker" and args.processes > 1)]
    root = Path(tempfile.mkdtemp(prefix="faults_"))
    jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _import_everything()

    longest = 0.0
    for name in ("first", "straight"):  # the first one compiles
        began = time.monotonic()
        statuses = run("undisturbed", args, root / name, rng, 0)
        longest = time.monotonic() - began
        assert statuses == [0] * args.processes, (statuses, (root / f"{name}.log").read_text()[-3000:])
    wanted = in_child(final, root / "straight")
    assert not compare(wanted, in_child(final, root / "first")), "two undisturbed runs differ"
    print(f"an undisturbed run takes {longest:.1f} s", flush=True)

    done, failures, tally = 0, [], collections.Counter()
    with tqdm(total=args.faults, unit="fault", disable=None) as bar:
        while done < args.faults:
            workdir = root / f"trial_{done}"
            try:
                for _ in range(rng.randint(1, 4)):
                    kind = rng.choice(kinds)
                    done += 1
                    bar.update()
                    log = Path(f"{workdir}.log")
                    before = log.stat().st_size if log.exists() else 0
                    statuses = run(kind, args, workdir, rng, longest)
                    tally.update((kind, status) for status in statuses)
                    allowed = ALLOWED[kind]
                    ended_alone = NOTHING_TO_SAVE in log.read_bytes()[before:]
                    if args.processes > 1 and (kind in MAY_LOSE_A_PEER or ended_alone):
                        allowed = allowed | PEER_LOST
                    if not set(statuses) <= allowed:
                        raise AssertionError(f"{kind}: statuses {statuses}, allowed {sorted(allowed)}")
                    if kind == "term" and len(set(statuses)) > 1 and not ended_alone:
                        raise AssertionError(f"{kind}: the processes did not end alike: {statuses}")
                statuses = run("undisturbed", args, workdir, rng, longest)
                if set(statuses) != {0}:
                    raise AssertionError(f"left alone: statuses {statuses}")
                difference = compare(wanted, in_child(final, workdir))
                if difference:
                    raise AssertionError(difference)
                shutil.rmtree(workdir)
            except (AssertionError, Hang, RuntimeError) as error:
                failures.append(f"{workdir}: {error}")
                print(failures[-1], flush=True)
    for (kind, status), count in sorted(tally.items()):
        print(f"{kind:12} ended with {status:4}: {count}")
    print(f"{done} faults, {len(failures)} failures")
    if not failures:
        shutil.rmtree(root)
    return len(failures)


def _import_everything():
    import clu.metric_writers  # noqa: F401
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorflow  # noqa: F401

    from polaformer_jax.training import loop, runtime  # noqa: F401
    from tests.support import runs  # noqa: F401


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="where sklearn_digits is prepared")
    parser.add_argument("--faults", type=int, default=150)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    ARGS = parser.parse_args()
    sys.exit(1 if campaign(ARGS) else 0)
