"""All benchmarks of these models on a GPU or TPU in one run, with one CSV file for each part.

    polaformer benchmark all --out results --official ~/PolaFormer --official-by eager compiled

The parts are the benchmarks `ceilings`, `attention` and `model` with the sizes of `PARTS`, each in its own process.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

from tqdm import tqdm

from polaformer_jax.benchmark import official
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths

_TIMING = ("--calls=10", "--seconds=1")
_CORE = ("attention", "--dtype=bfloat16", "--batch-size=128", *_TIMING)
_MODEL = ("model", "--dtypes", "bfloat16", "--devices=1", "--modes", "forward", "gradient", "step", *_TIMING)

# What to run, by the name of the CSV file. Cores have the heads of Pola-Swin-T in stage 1 and of Pola-PVT in stage 2.
PARTS: dict[str, tuple[str, ...]] = {
    "ceilings": ("ceilings", *_TIMING),
    "core_3x32": (*_CORE, "--heads=3", "--width=32", "--tokens", "49", "196", "784", "3136"),
    "core_2x64": (*_CORE, "--heads=2", "--width=64", "--tokens", "49", "196", "784"),
    "pola_pvt_t": (*_MODEL, "--models=pola_pvt_t", "--batch-sizes=256"),
    "pola_swin_t": (*_MODEL, "--models=pola_swin_t", "--batch-sizes=128"),
    "pola_swin_b": (*_MODEL, "--models=pola_swin_b", "--batch-sizes=64"),
}


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The name of each part, and the arguments of its process."""
    for name, part in PARTS.items():
        theirs = ()
        if part[0] == "model" and args.official is not None:
            theirs = (f"--official={args.official}", f"--official-python={args.official_python}")
            theirs += (f"--threads={args.threads}", "--official-by", *args.official_by)
        yield name, [*part, *theirs, f"--csv={paths.given(args.out, 'out') / name}.csv"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder for the CSV files; created if necessary")
    official.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    out = paths.given(args.out, "out")
    if paths.in_bucket(out):
        raise UserError(f"{out}: a local folder is needed", argument="out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created: {error}", argument="out") from error
    official.openers(args)  # invalid options are found before anything is measured
    failed = []
    with tqdm(total=len(PARTS), desc="parts", unit="part", disable=None) as bar:
        for name, words in commands(args):
            bar.set_postfix_str(name)
            tqdm.write(f"\n{name}: {' '.join(words)}")
            status = subprocess.run([sys.executable, "-m", "polaformer_jax.cli", "benchmark", *words]).returncode
            failed += [name] if status else []
            bar.update()
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see above; the other parts are in {args.out}")
