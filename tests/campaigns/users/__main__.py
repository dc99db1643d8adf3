"""What users do that nobody planned for: each situation with the right outcome, on a tiny folder of images.

    python -m tests.campaigns.users
    python -m tests.campaigns.users --only path --keep /tmp/users

A situation is one or a few commands, each in a process of its own: forked from this one, in which everything is
imported but no device opened, or started anew where the process itself is what is tested. The model is two dense
layers. A situation that this machine cannot make (another user, a small /dev/shm) is reported as left out.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tqdm import tqdm

from tests.campaigns.users import input, names_and_results, others, situation, surroundings  # noqa: F401
from tests.support.quick import FLAGS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds and situations whose names contain this")
    parser.add_argument("--keep", metavar="FOLDER", help="folder to work in, which is kept [a temporary one]")
    args = parser.parse_args()
    chosen = [
        (kind, function)
        for kind, functions in situation.SITUATIONS.items()
        for function in functions
        if args.only in f"{kind} {function.__name__}"
    ]
    import clu.metric_writers  # noqa: F401
    import tensorflow  # noqa: F401

    import polaformer_jax.training.export  # noqa: F401
    import polaformer_jax.training.loop  # noqa: F401

    failed, left_out = [], []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["XLA_FLAGS"] = FLAGS
        for kind, function in tqdm(chosen, unit="situation", disable=None):
            name = f"{kind}: {function.__name__.replace('_', ' ')}"
            started = time.monotonic()
            try:
                function(folder / function.__name__)
            except situation.LeftOut as reason:
                left_out.append(name)
                tqdm.write(f"left out  {name}: {reason}")
            except Exception:
                failed.append(name)
                tqdm.write(f"FAILED    {name}\n{traceback.format_exc()}")
            else:
                tqdm.write(f"as wanted {name} ({time.monotonic() - started:.1f} s)")
    print(
        f"{len(chosen)} situations in {time.monotonic() - began:.0f} s: {len(failed)} failed, {len(left_out)} left out"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
