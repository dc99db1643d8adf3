"""What a finished training says of itself in `training.json`: its length, its time, the hardware, the code."""

import json
import os
import subprocess
from pathlib import Path

import jax
from etils import epath

from polaformer_jax.files import atomic
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.writers import read_scalars

FILE = "training.json"


def write(workdir: epath.Path, experiment: Experiment) -> None:
    """Writes `training.json`; on other processes than the first nothing.

    `seconds` are those of the training steps: without evaluations, checkpoints and compilation, and counted once where
    a run was stopped and repeated some of them.
    """
    if jax.process_index() == 0:
        seconds = read_scalars(workdir)["seconds"][1].sum()
        content = {
            "steps": experiment.length.total,
            "seconds": round(float(seconds), 1),
            "hardware": hardware(experiment.mesh.size),
            "commit": commit(),
        }
        atomic.write(workdir / FILE, json.dumps(content, indent=2) + "\n")


def hardware(devices: int) -> str:
    """So many devices, named as JAX names them; of a CPU also its cores."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    return f"{devices} x {device.device_kind}"


def commit() -> str:
    """The commit of this code, with a plus where files were changed since; empty if it is no git checkout."""
    folder = Path(__file__).parent
    try:
        found, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ("rev-parse", "--short=7", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "*.py", ":(top)configs"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{found}+" if changed else found
