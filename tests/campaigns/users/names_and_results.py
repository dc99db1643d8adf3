"""Situations of names that are not plain, and of results that could be lost."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.campaigns.users.situation import Situation, files_below, situation

# --- names that are not plain


@situation("names")
def classes_with_any_names(path: Path) -> None:
    byte = os.fsdecode(b"caf\xe9")
    here = Situation(path, classes=["$a$b", "\n new", byte])
    here.trained("--config.log.pictures=True")
    assert {"confusion.png", "predictions.png", "curves.png"} <= files_below(here.run / "pictures")
    table = path / "table.csv"
    outcome = here.evaluate(f"--predictions={table}", f"--save-weights={path / 'a.safetensors'}")
    assert outcome.status == 0, outcome
    assert "caf\\xe9" in table.read_text() and "$a$b" in table.read_text() and "\\n new" in table.read_text()
    image = here.data / "val" / byte / "1.png"
    weights = here.small_weights(["$a$b", "\n new", byte])
    outcome = here("predict", "--weights", weights, f"--picture={path / 'maps.png'}", image)
    assert outcome.status == 0 and "caf\\xe9/1.png" in outcome.out and "caf\\xe9\n" in outcome.out, outcome
    assert (path / "maps.png").exists()


@situation("names")
def a_picture_that_cannot_be_drawn(path: Path) -> None:
    here = Situation(path)

    def broken() -> None:
        from polaformer_jax.training.tasks import classification_pictures

        classification_pictures.confusion = mock.Mock(side_effect=ValueError("no such colour"))

    outcome = here.train("--config.log.pictures=True", before=broken)
    assert outcome.status == 0 and "test accuracy" in outcome.out and "confusion.png was not drawn" in outcome.err, (
        outcome
    )
    assert {"curves.png", "predictions.png"} <= files_below(here.run / "pictures")


# --- results are never lost


def _limited(size: int) -> Callable[[], None]:
    """Files cannot become larger, as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@situation("results")
def a_disk_that_is_full(path: Path) -> None:
    here = Situation(path)
    here.trained()
    shutil.copy(here.run / "eval.json", path / "before.json")
    outcome = here.evaluate(before=_limited(1000))  # nothing can be written: known before the work
    assert outcome.status == 1 and outcome.is_message and not outcome.out and "cannot be written" in outcome.err, (
        outcome
    )
    table = path / "table.csv"

    def full_at_the_end() -> None:
        from polaformer_jax.training import evaluation

        evaluation.write_json = mock.Mock(
            side_effect=evaluation.UserError("result 'eval.json' cannot be written: full")
        )

    outcome = here.evaluate(f"--predictions={table}", before=full_at_the_end)
    assert outcome.status == 1 and outcome.is_message and json.loads(outcome.out)["images"] == 24, outcome
    assert table.exists()


@situation("results")
def a_folder_that_cannot_be_written(path: Path) -> None:
    here = Situation(path)
    here.trained()
    (here.run / "eval.json").unlink()
    (here.run / "eval.json").mkdir()
    outcome = here.evaluate()
    assert outcome.status == 1 and outcome.is_message and "is a folder" in outcome.err, outcome
    outcome = here.evaluate(f"--json={here.recipe / 'a.json'}")
    assert outcome.status == 1 and outcome.is_message and "cannot be written" in outcome.err, outcome


@situation("results")
def output_that_goes_nowhere(path: Path) -> None:
    here = Situation(path)
    here.trained()

    def to_a_full_device() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    def to_a_closed_pipe() -> None:
        receive, send = os.pipe()
        os.close(receive)
        os.dup2(send, 1)

    outcome = here.evaluate(before=to_a_full_device)
    assert outcome.status == 1 and outcome.is_message and "the output cannot be written" in outcome.err, outcome
    outcome = here.evaluate(before=to_a_closed_pipe)
    assert outcome.status == 1 and "Traceback" not in outcome.err and "error" not in outcome.err, outcome
