"""A work directory belongs to one run and is used by one training at a time."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from polaformer_jax.errors import UserError
from polaformer_jax.training import recipes
from polaformer_jax.training.config_checks import check
from polaformer_jax.training.workdir import claim, commit, read_config
from tests.support.log_messages import logged
from tests.support.recipes import digits as get_config


def test_the_config_is_kept(tmp_path):
    config = get_config()
    with claim(tmp_path / "run", config):
        pass
    assert read_config(tmp_path / "run").to_dict() == json.loads(json.dumps(config.to_dict()))


def test_the_same_run_may_come_back_elsewhere_and_log_otherwise(tmp_path):
    config = get_config()
    with claim(tmp_path, config):
        (tmp_path / "checkpoints/10").mkdir(parents=True)
    config.data.workers = 7
    config.data.data_dir = "/elsewhere"
    config.mesh.data = 2
    config.log.every = 1
    config.checkpoint.keep_last = 5
    config.eval.batch_size = 3
    with claim(tmp_path, config):
        pass


def test_a_run_may_come_back_with_less_memory_which_is_logged(tmp_path):
    config = get_config()
    with claim(tmp_path, config):
        (tmp_path / "checkpoints/10").mkdir(parents=True)
    config.model.remat, config.model.attention_impl, config.mesh.fsdp = True, "xla", 2
    with logged() as said, claim(tmp_path, config):
        pass
    assert [line.removeprefix("the run is computed in another way from here on: ") for line in said] == [
        "mesh.fsdp: 1 there, 2 now",
        "model.attention_impl: 'auto' there, 'xla' now",
        "model.remat: False there, True now",
    ]
    assert read_config(tmp_path).model.remat
    config.model.dtype = "bfloat16"
    with pytest.raises(UserError, match="model.dtype: 'float32' there, 'bfloat16' now"), claim(tmp_path, config):
        pass


def test_another_run_is_refused_with_the_differences(tmp_path):
    config = get_config()
    with claim(tmp_path, config):
        (tmp_path / "checkpoints/10").mkdir(parents=True)
    config.optimizer.lr = 0.5
    config.seed = 1
    with pytest.raises(UserError) as error, claim(tmp_path, config):
        pass
    assert "  optimizer.lr: 0.001 there, 0.5 now\n  seed: 0 there, 1 now\n" in str(error.value)


def test_a_mended_config_is_welcome_while_there_is_no_checkpoint(tmp_path):
    config = get_config()
    with claim(tmp_path, config):
        pass
    config.data.train_split = "mended"
    with claim(tmp_path, config):
        assert read_config(tmp_path).data.train_split == "mended"


def test_a_run_older_than_a_field_has_its_default(tmp_path):
    config = get_config()
    with claim(tmp_path, config):
        (tmp_path / "checkpoints/10").mkdir(parents=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["model"]["alpha"], stored["checkpoint"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path).model.alpha is None
    with claim(tmp_path, config):
        pass


@pytest.mark.parametrize("recipe", ["digits", "lra:listops", "lra:listops,attention=softmax"])
def test_a_run_from_before_the_attention_was_a_field_of_the_model_resumes(tmp_path, recipe):
    """Version 0.2 had `task.attention` in all configs, and an alpha beside other attentions if it was given."""
    config = recipes.load(recipe)
    with claim(tmp_path, config):
        (tmp_path / "checkpoints/10").mkdir(parents=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["task"]["attention"] = stored["model"].pop("attention")
    if stored["task"]["attention"] == "softmax":
        stored["model"]["alpha"] = 3.0
    for name in ("convolution", "gate", "mlp_ratio"):
        del stored["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path).to_dict() == json.loads(json.dumps(config.to_dict()))
    check(read_config(tmp_path))
    with claim(tmp_path, config):
        pass


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task.attention": "softmax"}, "task.attention='softmax': it is model.attention now"),
        ({"model.attention": "relu", "model.alpha": 3.0}, "model.alpha=3.0: with model.attention='relu' there is none"),
        ({"model.convolution": False, "model.kernel_size": 3}, "model.kernel_size=3: with model.convolution=False"),
    ],
)
def test_a_field_without_effect_is_refused(changes, message):
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
        if "task.attention" in changes:  # as a recipe of one's own may set it
            config.task.attention = changes["task.attention"]
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {')
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(tmp_path)


def test_two_trainings_at_once_are_refused(tmp_path):
    with claim(tmp_path, get_config()), pytest.raises(UserError, match=r"another process \(pid \d+\) is training in"):
        with claim(tmp_path, get_config()):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(number, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with logged() as messages, claim(tmp_path, get_config()):
        pass
    (message,) = messages
    assert f"cannot be locked ({os.strerror(number)})" in message


def test_a_killed_training_leaves_no_lock(tmp_path):
    program = (
        "import os, signal, sys; from configs.digits import get_config\n"
        "from polaformer_jax.training.workdir import claim\n"
        "with claim(sys.argv[1], get_config()): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert killed.returncode == -9
    with claim(tmp_path, get_config()):
        pass


def test_the_commit_is_that_of_the_code(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    package, installed = tmp_path / "polaformer_jax", tmp_path / ".venv/polaformer_jax"
    for folder in (package, installed):
        (folder / "models").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "models/layers.py").write_text("")
    assert commit(package) == ""  # not a git checkout
    (tmp_path / ".gitignore").write_text(".venv\n")
    (tmp_path / "notes.txt").write_text("")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "--short=7", "HEAD").stdout.strip()
    assert commit(package) == head
    (tmp_path / "notes.txt").write_text("not code")
    assert commit(package) == head
    (package / "models/layers.py").write_text("changed = True\n")
    assert commit(package) == f"{head}+"
    assert commit(installed) == ""  # in an environment inside the checkout of another project


def test_a_folder_that_is_no_work_directory(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        read_config(tmp_path)


def test_a_full_disk_is_an_error_of_one_sentence(tmp_path):
    program = (
        "import resource, signal, sys; from configs.digits import get_config\n"
        "from polaformer_jax.errors import UserError; from polaformer_jax.training.workdir import claim\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails as on a full disk\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n    with claim(sys.argv[1], get_config()): pass\n"
        "except UserError as error: sys.exit(f'error: {error}')"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: the work directory {tmp_path} cannot be written")
