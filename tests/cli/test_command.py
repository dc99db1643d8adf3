"""The command line without processes: configs with overrides, and what becomes of errors."""

import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import polaformer_jax
from polaformer_jax import cli
from polaformer_jax.cli import command
from polaformer_jax.errors import Interrupted, UserError
from polaformer_jax.training import recipes
from tests.support import ROOT

DIGITS = f"{ROOT}/configs/digits.py"


@pytest.fixture
def parser():
    found = command.Parser("train", "Trains.\n\nAt length.")
    found.add_config_argument(help="the config")
    found.add_argument("--data-dir")
    return found


def parsed(parser, *words):
    return parser.parse_with_config(["--config", DIGITS, *words])[1]


@pytest.mark.parametrize(
    "words, field, value",
    [
        (["--config.optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
        (["--config.optimizer.lr", "2e-3"], "optimizer.lr", 2e-3),
        (["--config.seed", "-1"], "seed", -1),
        (["--config.model.remat"], "model.remat", True),
        (["--config.model.remat", "--noconfig.model.remat"], "model.remat", False),
        (["--config.augment.crop_area=(0.5, 1.0)"], "augment.crop_area", (0.5, 1.0)),
        (["--config.train.epochs=None"], "train.epochs", None),
        (["--config.model.num_classes=None"], "model.num_classes", None),
        (["--config.checkpoint.every_minutes=None"], "checkpoint.every_minutes", None),
        (["--config.watchdog.step_s=None"], "watchdog.step_s", None),
        (["--config.watchdog.input_s=None"], "watchdog.input_s", None),
        (["--config.train.epochs=3", "--config.train.epochs=4"], "train.epochs", 4.0),
        (["--config.train.epochs=None", "--config.train.epochs=4"], "train.epochs", 4.0),
        (["--config.train.epochs=3", "--config.train.epochs=None"], "train.epochs", None),
        (["--config.optimizer.clip_norm", "1", "--config.optimizer.clip_norm", "None"], "optimizer.clip_norm", None),
    ],
)
def test_an_override_sets_a_field(parser, words, field, value):
    found = parsed(parser, *words)
    for part in field.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.optimizer.rate=1"], "there is no field optimizer.rate. polaformer_jax/config.py describes all"),
        (["--config.optimizer.lrs=1"], "there is no field optimizer.lrs. Did you mean optimizer.lr?"),
        (["--config.optimiser.lr=1"], "there is no field optimiser.lr. Did you mean optimizer?"),
        (["--config.optimiser.lr=None"], "there is no field optimiser.lr. Did you mean optimizer?"),
        (["--config.seed.x=1"], "there is no field seed.x"),
        (["--config.augment.crop_area[0]=0.5"], "tuples are set whole"),
        (["--config.optimizer.lr=fast"], "could not convert string to float: 'fast'"),
        (["--config.optimizer.lr="], "could not convert string to float: ''"),
        (["--config.optimizer=3"], "optimizer is a section of the config; set its fields: b1, b2"),
        (["--config.model=None"], "model is a section of the config; set its fields: alpha"),
        (["--config.model.remat=perhaps"], "Non-boolean argument to boolean flag"),
        (["--config.seed=None"], "--config.seed=None: this field must have a value, such as 0"),
        (["--config.=3"], "expected --config.FIELD=VALUE with a field"),
        (["--config."], "expected --config.FIELD=VALUE with a field"),
        (["there"], "unexpected arguments there"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(parser, words, message):
    with pytest.raises(UserError) as refused:
        parsed(parser, *words)
    assert message in str(refused.value)


def test_overrides_need_a_config(parser):
    with pytest.raises(UserError, match="give the config whose field it changes by --config"):
        parser.parse_with_config(["--config.seed=1"])
    assert parser.parse_with_config([])[1] is None


@pytest.mark.parametrize("spelling", ["--data-dir", "--data_dir"])
def test_options_are_spelt_with_dashes_or_underscores(parser, spelling, capsys):
    args, _ = parser.parse_with_config([spelling, "here", "--config", "digits"])
    assert args.data_dir == "here"
    help = parser.format_help()
    assert "--data-dir" in help and "--data_dir" not in help


@pytest.mark.parametrize("words", [["--data"], ["--conf", "digits"], ["--config", "digits", "--epochs=3"]])
def test_unknown_and_abbreviated_options_are_refused(parser, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_with_config(words)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " digits", "configs", "nothing", "nothing.py:swin", "README.md", "setup.cfg:x"])
def test_what_is_no_recipe_is_refused_with_those_that_are(parser, text, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="expected the path of a Python file|expected a Python file"):
        parser.parse_with_config([f"--config={text}"])


def test_packaged_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = "digits fashion_mnist finetune lra pola_pp pola_pvt pola_swin segmentation"
    assert sorted(recipes.packaged()) == known.split()
    assert recipes.load("pola_swin:t").model.name == "pola_swin_t"
    assert recipes.load(DIGITS) == recipes.load("digits")


OWN = """
from __future__ import annotations
import dataclasses
from polaformer_jax.config import defaults

@dataclasses.dataclass
class Size:
    pixels: int

def get_config():
    config = defaults()
    config.model.img_size = Size(64).pixels
    config.mine = None
    return config
"""


def test_a_recipe_of_ones_own(tmp_path, parser):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    assert recipes.load(str(own)).model.img_size == 64
    assert parser.parse_with_config([f"--config={own}", "--config.mine=None"])[1].mine is None
    with pytest.raises(UserError, match="takes no argument, found 'swin'"):
        recipes.load(f"{own}:swin")
    own.write_text("def get_config():\n    return {'seed': 0}\n")
    with pytest.raises(UserError, match="get_config returns a dict, expected a ConfigDict"):
        recipes.load(str(own))


def test_a_recipe_for_version_0_1_is_refused_with_what_changed(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from configs.defaults import defaults\n")
    with pytest.raises(UserError, match="defaults.. and use_official_augmentation.. are in polaformer_jax.config"):
        recipes.load(str(own))


@pytest.mark.parametrize(
    "text, message",
    [
        ("import nothing_like_this", "own.py' imports 'nothing_like_this', which is not installed"),
        ("x = 1\ndef get_config(:", "own.py', line 2: SyntaxError: "),
        ("def get_config():\n    return {}['lr']", "own.py', line 2: KeyError: lr"),
        (
            "from polaformer_jax.config import defaults\ndef get_config():\n    config = defaults().lock()\n"
            "    config.optimizer.lrr = 1",
            'own.py\', line 4: AttributeError: Key "lrr" does not exist',
        ),
        ("def get_config(): pass", "own.py': get_config returns a NoneType"),
    ],
)
@pytest.mark.parametrize("place", ["own.py", "./own.py"])
def test_a_recipe_that_fails_is_one_line_that_names_its_own(place, text, message, tmp_path, monkeypatch):
    own = tmp_path / "own.py"
    own.write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        recipes.load(place)
    assert message in str(error.value) and "\n" not in str(error.value)


def raising(error):
    def action():
        raise error

    return action


def test_errors_become_one_message(capsys):
    assert command.run(raising(UserError("no such folder", argument="data_dir"))) == 1
    assert command.run(raising(UserError("no such file", argument="file")), options={"file": "FILE"}) == 1
    assert command.run(raising(UserError("broken"))) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: --data-dir: no such folder",
        "error: FILE: no such file",
        "error: broken",
    ]


def test_an_interruption_has_its_own_status(capsys):
    stop = Interrupted("stopped at step 3")
    assert command.run(raising(stop)) == stop.status not in (0, 1)
    assert capsys.readouterr().err == "interrupted: stopped at step 3\n"


def test_a_missing_extra_is_named_and_any_other_missing_module_is_a_bug(capsys):
    assert command.run(raising(ModuleNotFoundError("none", name="tensorflow_datasets"))) == 1
    assert 'pip install "polaformer_jax[train]"' in capsys.readouterr().err
    for name in ("polaformer_jax.nothing", "jax", None):
        with pytest.raises(ModuleNotFoundError):
            command.run(raising(ModuleNotFoundError("none", name=name)))


def test_the_modules_of_the_extra_are_those_of_its_packages():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = {canonicalize_name(Requirement(text).name) for text in extra} - {"tensorflow", "tensorflow-cpu"}
    providers = importlib.metadata.packages_distributions()
    found = {canonicalize_name(providers[module][0]) for module in command.TRAINING_MODULES - {"tensorflow"}}
    assert found == names


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(unbuffered):
    program = "from polaformer_jax.cli import command; exit(command.run(lambda: print(9 * chr(97))))"
    ended = subprocess.run(
        f"(sleep 0.3; {sys.executable} -c '{program}'; echo $? >&2) | true", shell=True, cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert ended.stderr == "1\n"


def test_output_that_cannot_be_written_is_an_error():
    for text in ("9 * chr(97)", "99999 * chr(97)"):  # written at the end, and at once
        program = f"from polaformer_jax.cli import command; exit(command.run(lambda: print({text})))"
        ended = subprocess.run(
            f"{sys.executable} -c '{program}' > /dev/full", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 1 and ended.stderr == (
            "error: the output cannot be written: [Errno 28] No space left on device\n"
        )


def test_a_result_that_was_printed_but_not_written_is_an_error_whatever_else_is():
    program = (
        "from polaformer_jax.cli import command\nfrom polaformer_jax.errors import UserError\n"
        "def action():\n    print(1)\n    raise UserError('no disk')\nexit(command.run(action))"
    )
    command_line = f'{sys.executable} -c "$0" > /dev/full'
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(["sh", "-c", command_line, program], cwd=ROOT, capture_output=True, text=True, env=buffered)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "error: no disk",
        "error: the output cannot be written: [Errno 28] No space left on device",
    ]


def test_a_process_without_standard_streams_works(tmp_path):
    program = (
        "import os, sys\nfrom polaformer_jax.cli import command\n"
        "def action():\n    print(1)\n    print(2, file=sys.stderr)\n"
        f"    open({str(tmp_path / 'fd')!r}, 'w').write(str(os.open('/dev/null', os.O_RDONLY)))\n"
        "exit(command.run(action))"
    )
    script = 'exec "$0" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, sys.executable, program], cwd=ROOT).returncode == 0
    assert int((tmp_path / "fd").read_text()) > 2  # messages of libraries do not go to a file of ours


def test_what_a_terminal_cannot_show_is_printed_escaped():
    program = "from polaformer_jax.cli import command; exit(command.run(lambda: print(chr(0x441) + chr(0xdce9))))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.stdout == "\\u0441\\udce9\n"


def test_a_device_that_is_not_there_is_one_message():
    program = "from polaformer_jax.cli import command\nimport jax\nexit(command.run(jax.device_count))"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1 and ended.stderr.startswith("error: JAX cannot use a device (")
    assert "JAX_PLATFORMS=cuda asks for one" in ended.stderr and ended.stderr.count("\n") == 1


def test_another_broken_pipe_is_a_bug():
    program = "from polaformer_jax.cli import command\ndef worker_died():\n    raise BrokenPipeError\n"
    program += "command.run(worker_died)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "in worker_died" in ended.stderr


def test_an_aborted_process_shows_where_it_was():
    program = "import os\nfrom polaformer_jax.cli import command\ndef lost():\n    os.abort()\ncommand.run(lost)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in ended.stderr and "in lost" in ended.stderr


def test_an_error_names_its_parameter_in_the_library_and_the_option_on_the_command_line(capsys):
    error = UserError("'4x': expected a step", argument="checkpoint")
    assert str(error) == "checkpoint: '4x': expected a step"
    assert command.run(raising(error)) == 1
    assert capsys.readouterr().err == "error: --checkpoint: '4x': expected a step\n"


@pytest.mark.parametrize("module", ["data.prepare", "data.lra.prepare", "data.to_arrayrecord"])
def test_commands_of_version_0_1_name_the_new_one(module):
    ended = subprocess.run(
        [sys.executable, "-m", f"polaformer_jax.{module}", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "use: polaformer prepare" in ended.stderr


def test_a_bug_is_raised():
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 // 0)


def test_no_command_prints_the_list(capsys):
    assert cli.main([]) == 2
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["--help"]) == 0


def test_a_mistyped_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "there is no command 'trian'. Did you mean train?" in capsys.readouterr().err


def test_the_version_is_that_of_the_installed_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"polaformer_jax {polaformer_jax.__version__}\n"
    assert importlib.metadata.version("polaformer_jax") == polaformer_jax.__version__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"polaformer_jax.cli.{cli.COMMANDS[name][0]}").main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: polaformer {name} ")
    assert max(map(len, shown.splitlines())) <= 120
