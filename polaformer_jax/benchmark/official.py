"""The official PyTorch code, in its own process and ready to be timed next to ours.

The checkout is the user's (https://github.com/ZacharyMeng/PolaFormer; for PolaFormer++ the folder `polaformer++` of
https://github.com/ZacharyMeng/PolaFormerPP); nothing is fetched or contained in this package.
"""

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from polaformer_jax.benchmark.ours import CLASSES, Case
from polaformer_jax.benchmark.workers import Worker
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.models import registry

Opener = Callable[[Case, Sequence[str], str], "Official"]

MODES = ("forward", "gradient")  # that both codes have
_NAMES = {"eager": "official", "compiled": "official, compiled"}
_WORKER = Path(__file__).with_name("official_worker.py")
_FILES = {"PolaPVT": "models/pola_pvt.py", "PolaSwin": "models/pola_swin.py", "PolaPP": "models/pola.py"}


def threads_here() -> int:
    """Number of threads with which JAX computes on a CPU: one for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--official", metavar="PATH", help="checkout of the official code, to measure next to ours")
    parser.add_argument(
        "--official-python",
        metavar="PYTHON",
        default=sys.executable,
        help="a Python with torch, timm and einops [this one]",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=threads_here(),
        help="threads of other code than ours on a CPU [as many as JAX uses: the cores of this process, which taskset "
        "limits for both]",
    )
    parser.add_argument(
        "--official-by",
        nargs="+",
        choices=tuple(_NAMES),
        default=["eager"],
        help="how the official code runs: eager, compiled by torch.compile, or both in turns [eager]",
    )


def openers(args: argparse.Namespace) -> "dict[str, Opener]":
    """Functions that start the official code, by the name of each requested variant; none without `--official`.

    Args:
        args: contains the options of `add_arguments`.

    Raises:
        UserError: there is no such checkout or Python.
    """
    if args.official is None:
        return {}
    checkout = Path(paths.given(args.official, "official"))
    python = interpreter(args.official_python, "official_python", "PyTorch")
    if not any((checkout / name).is_file() for name in _FILES.values()):
        raise _missing(checkout, _FILES["PolaPVT"])

    def start(case: Case, modes: Sequence[str], platform: str, *, compiled: bool) -> Official:
        return Official(
            checkout,
            case,
            python=python,
            platform=platform,
            modes=modes,
            threads=args.threads,
            compiled=compiled,
        )

    return {_NAMES[by]: functools.partial(start, compiled=by == "compiled") for by in args.official_by}


def interpreter(given: str, argument: str, package: str) -> str:
    """The path of a Python that an option names.

    Raises:
        UserError: there is no such program.
    """
    path = paths.given(given, argument)
    python = shutil.which(path) or os.fspath(path)
    if not os.access(python, os.X_OK):
        flag = "--" + argument.replace("_", "-")
        raise UserError(f"{flag} {python}: there is no such program; expected a Python with {package}")
    return python


def _missing(path: Path, name: str) -> UserError:
    return UserError(f"--official {path}: there is no {name} in it; expected a checkout of the official code")


class Official(Worker):
    """One official model, built and warm, in a process that lives until `close`. Use as a context manager.

    Attributes:
        subjects: by mode.
        version: the version of PyTorch.

    Args:
        path: path of the checkout. Its code is run: only give one that you trust.
        python: a Python with PyTorch, timm and einops.
        platform: platform of JAX's device; the official model runs there too.
        modes: modes of `subjects`.
        threads: threads of PyTorch, on a CPU.
        compiled: whether `torch.compile` compiles the model; otherwise it runs eagerly.

    Raises:
        UserError: it does not import, build or run, or not on this platform.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        case: Case,
        *,
        python: str,
        platform: str,
        modes: Sequence[str],
        threads: int,
        compiled: bool,
    ):
        if platform not in ("cpu", "gpu"):
            raise UserError(f"--official runs on a CPU or by CUDA, but JAX is on a {platform}: omit it")
        config = registry.model_config(case.model, num_classes=CLASSES, img_size=case.img_size)
        if not (Path(path) / _FILES[config.family]).is_file():
            raise _missing(Path(path), _FILES[config.family])
        question = {
            "family": config.family,
            "arguments": config.to_dict(),
            "batch": case.batch,
            "dtype": case.dtype,
            "device": "cuda" if platform == "gpu" else "cpu",
            "modes": list(modes),
            "threads": threads,
            "compiled": compiled,
        }
        failure = (
            f"--official {path}: {case} does not run in its process: {{error}}. It needs torch, timm and einops as its "
            "README says: give a Python with them as --official-python"
        )
        super().__init__([python, _WORKER, Path(path).resolve()], question, failure=failure)
        self.version: str = self.answer["version"]
