"""A kill or a failure during a save leaves the old model or the new one."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from pseuzo import files

pytestmark = pytest.mark.slow


class Saved:
    """A model that can be saved."""

    def __init__(self, content):
        self.content = content

    def save_pretrained(self, folder, state_dict=None):
        folder.mkdir()
        (folder / "weights").write_text(self.content)


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_during_a_save_leaves_no_copy_for_ever(tmp_path, call):
    """The kill comes before the old model is moved away (1), or after it (2)."""
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with files.claim(out, "train") as first:
        files.save_model(Saved("old"), None, out / "model")
    assert sorted(f.name for f in out.iterdir()) == [files.MARKER, "model"]
    child = os.fork()
    if child == 0:
        rename, calls = Path.rename, []

        def dies(*args):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(*args)

        Path.rename = dies
        files.save_model(Saved("new"), None, out / "model")
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (out / ".model.saving" / "new" / "weights").read_text() == "new"
    with files.claim(out, "train") as again:
        assert sorted(f.name for f in out.iterdir()) == [files.MARKER, "model"]
    assert (out / "model" / "weights").read_text() == ("old" if call == 1 else "new")
    assert first == again and len(first) == 16


def test_a_save_at_work_is_left_alone(tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with files.claim(out, "train"):
        pass
    (began, begins), (ends, end) = os.pipe(), os.pipe()

    class Waits(Saved):
        def save_pretrained(self, folder, state_dict=None):
            super().save_pretrained(folder)
            os.write(begins, b".")
            os.read(ends, 1)

    child = os.fork()
    if child == 0:
        files.save_model(Waits("theirs"), None, out / "model")
        os._exit(0)
    try:
        assert os.read(began, 1) == b"."
        with files.claim(out, "train"):
            assert (out / ".model.saving" / "new" / "weights").read_text() == "theirs"
        with pytest.raises(ValueError, match="model is being saved by another process"):
            files.save_model(Saved("mine"), None, out / "model")
        os.write(end, b".")
        assert os.waitpid(child, 0)[1] == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert (out / "model" / "weights").read_text() == "theirs" and not (
        out / ".model.saving"
    ).exists()


def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(tmp_path):
    model = tmp_path / "model"
    files.save_model(Saved("old"), None, model)

    class Fails(Saved):
        def save_pretrained(self, folder, state_dict=None):
            super().save_pretrained(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.save_model(Fails("new"), None, model)
    assert [f.name for f in tmp_path.iterdir()] == ["model"] and (
        model / "weights"
    ).read_text() == "old"
    foreign = tmp_path / ".model.saving" / "thesis.txt"  # pseuzo removes only its own files
    foreign.parent.mkdir()
    foreign.touch()
    with pytest.raises(ValueError, match=r"thesis\.txt is in the way"):
        files.save_model(Saved("new"), None, model)
    with files.claim(tmp_path / "out", "train"):
        pass
    shutil.copytree(foreign.parent, tmp_path / "out" / ".model.saving")
    with files.claim(tmp_path / "out", "train"):
        assert (tmp_path / "out" / ".model.saving" / "thesis.txt").exists()
    assert foreign.exists() and (model / "weights").read_text() == "old"


def test_a_folder_is_usable_after_a_kill_before_its_mark_was_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / files.MARKER).touch()
    for _ in range(2):
        with files.claim(tmp_path / "run", "train"):
            pass
    (tmp_path / "run" / "theirs").touch()
    (tmp_path / "run" / files.MARKER).write_text("")
    with (
        pytest.raises(ValueError, match="is not empty, and not the folder of a run"),
        files.claim(tmp_path / "run", "train"),
    ):
        pass
