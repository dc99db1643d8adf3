"""Processes that answer questions: code of other programs, timed next to ours, or ours, alone in its memory."""

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence

from polaformer_jax.benchmark.ours import Subject
from polaformer_jax.errors import UserError


def answer_of(command: Sequence[str], question: dict, *, failure: str, folder: str | None = None) -> dict:
    """The answer of a process that reads one question from standard input, answers it and ends.

    Both are lines of JSON; what it prints before the answer is ignored.

    Args:
        failure: what to tell a user when the process fails, with `{error}` in it.
        folder: where the process runs; None: here.

    Raises:
        UserError: the process fails, or does not answer.
    """
    done = subprocess.run(
        [os.fspath(word) for word in command],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if done.returncode or not done.stdout.strip():
        raise UserError(failure.format(error=_end(done.returncode, done.stderr)))
    return json.loads(done.stdout.splitlines()[-1])


def _end(status: int, messages: str) -> str:
    lines = messages.strip().splitlines()
    return f"it ended with status {status}" + (f", saying {lines[-1]!r}" if lines else "")


class Worker:
    """A process that builds something at first, and then runs it once for each request; it lives until `close`.

    Questions and answers are lines of JSON. The first question says what to build; its answer has "compile_s" and
    "memory", by mode, and what else the worker says. The others are names of modes, answered by "seconds". An "error"
    in place of these is a text. Use as a context manager.

    Attributes:
        answer: the first one.
        subjects: by mode.

    Args:
        command: of the process.
        question: the first one; its "modes" are those of `subjects`.
        failure: what to tell a user when the worker fails, with `{error}` in it.

    Raises:
        UserError: the worker fails.
    """

    def __init__(self, command: Sequence[str], question: dict, *, failure: str):
        self._failure = failure
        # In a file, since a full pipe would stop the process; complete, since it may print much before it fails.
        self._messages = tempfile.TemporaryFile("w+", prefix="benchmark_worker_")
        self._process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )
        try:
            self.answer = self._ask(question)
        except BaseException:
            self.close()
            raise
        memory = self.answer["memory"]
        self.subjects = {
            mode: Subject(
                run=functools.partial(self.run, mode),
                compile_s=self.answer["compile_s"][mode],
                memory=memory[mode],
                memory_by="" if memory[mode] is None else "device",
                flops=None,
            )
            for mode in question["modes"]
        }

    def run(self, mode: str) -> float:
        """Runs it once and returns the seconds."""
        return self._ask(mode)["seconds"]

    def _ask(self, question: object) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise UserError(self._failure.format(error=answer["error"]))
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._messages.seek(0)
        return _end(status, self._messages.read())

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()
        self._messages.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
