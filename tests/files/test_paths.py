"""Paths that users give: expanded, checked, and taken literally by globs."""

import os
from pathlib import Path

import pytest
from etils import epath

from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, paths


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a", "runs/a"),
        (Path("/runs/a"), "/runs/a"),
        ("~/runs", "/home/user/runs"),
        ("~", "/home/user"),
        ("a~/b", "a~/b"),
        ("./~", "~"),
        ("./~nobody_of_this_name/a", "~nobody_of_this_name/a"),
        ("gs://bucket/runs", "gs://bucket/runs"),
        ("a:b/c", "a:b/c"),
        ("run [1] *?", "run [1] *?"),
    ],
)
def test_a_path_that_can_work(given, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    found = paths.given(given)
    assert os.fspath(found) == expected and os.fspath(paths.given(found)) == expected
    assert paths.in_bucket(found) == expected.startswith("gs://")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "the path is empty: is it made from a variable that is not set"),
        (" \n", "the path is empty"),
        (b"runs", "expected a path as text"),
        ("a\0b", "zero byte"),
        ("s3://bucket/run", "s3://bucket/run: s3:// is not supported"),
        ("https://example.org/a", "https:// is not supported"),
        ("file:///a", "file:// is not supported"),
        ("gs:/bucket/run", "expected gs://BUCKET"),  # what pathlib makes of a bucket
        ("gs://", "expected gs://BUCKET"),
        ("gs://bucket/run[1]", "without the characters"),
        ("~nobody_of_this_name/a", r"no such user\). Give the whole path, or ./~nobody_of_this_name/a"),
    ],
)
def test_a_path_that_cannot_work(given, message):
    with pytest.raises(UserError, match=message) as error:
        paths.given(given, "workdir")
    assert error.value.argument == "workdir"


@pytest.mark.parametrize("name", ["plain", "run[1]", "[a-z]*", "what?"])
def test_globs_below_any_folder(name, tmp_path):
    folder = tmp_path / name
    for file in ("b/metrics", "a/metrics", "a/other"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    given = paths.given(folder)
    assert list(given.glob("*/metrics")) == [folder / "a/metrics", folder / "b/metrics"]
    assert isinstance(next(epath.Path(given / "a").parent.glob("*")), paths.LocalPath)  # the class is kept


def test_a_target_is_tried_and_left_as_it_was(tmp_path):
    target = tmp_path / "new" / "result.json"
    assert atomic.check_target(target, "result") == target
    assert target.parent.is_dir() and not list(target.parent.iterdir())
    target.write_text("old")
    atomic.check_target(target, "result")
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="new is a folder: name a file"):
        atomic.check_target(target.parent, "result")
    with pytest.raises(UserError, match="result .*below.json' cannot be written: .*File exists"):
        atomic.check_target(target / "below.json", "result", argument="json_path")
    with pytest.raises(UserError, match="/dev/null is no regular file: name a file"):
        atomic.check_target("/dev/null", "result")
    with pytest.raises(UserError, match="cannot be written: .*No such file or directory"):
        atomic.check_target("/proc/none/result.json", "result")


def test_a_folder_that_is_held_is_told_from_another_of_its_name(tmp_path):
    folder = paths.given(tmp_path / "run")
    folder.mkdir()
    held = paths.Held(folder)
    assert held.is_in_place()
    folder.rename(tmp_path / "moved")
    assert not held.is_in_place()
    folder.mkdir()
    assert not held.is_in_place()
    held.close()


def test_without_a_home_the_cache_is_that_of_the_machine(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert paths.user_cache() == "/cache/polaformer_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does for a user that nobody knows
    assert os.path.isabs(paths.user_cache()) and "~" not in paths.user_cache()
