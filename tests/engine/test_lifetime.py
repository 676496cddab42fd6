"""Processes and folders that must not outlive their owner."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from conf.schema import ConfigError
from engine.lifetime import dying_with_parent
from engine.run_folder import RunFolder
from tests.served import ROOT

RANK = """
import os, signal
from conf.schema import compose
from engine.lifetime import rank_process
rank = rank_process(compose(["kernels.device=cpu"]), 0, "/nowhere")
print(rank.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_whose_parent_is_killed_at_once_ends_before_it_has_begun():
    parent = subprocess.run([sys.executable, "-c", RANK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(parent.stdout)).wait(timeout=20)
    assert "Traceback" not in parent.stderr


@pytest.mark.parametrize("moment", ["running", "not yet asked"])
def test_a_child_asked_to_die_with_its_parent_does(moment):
    ask = "ask()" if moment == "running" else "os.kill(os.getppid(), signal.SIGKILL); time.sleep(0.5); ask()"
    code = f"""
import os, signal, time
from engine.lifetime import dying_with_parent
ask = dying_with_parent()
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)
    {ask}
    time.sleep(60)
time.sleep(60 if {moment == "not yet asked"} else 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    child.wait(timeout=20)
    assert parent.wait(timeout=20) == -signal.SIGKILL
    parent.stdout.close()


def test_a_process_whose_parent_lives_goes_on():
    code = [sys.executable, "-c", "print('done')"]
    assert subprocess.run(code, preexec_fn=dying_with_parent(), capture_output=True, text=True).stdout == "done\n"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def aged(folder):
    folder.mkdir(exist_ok=True)
    (folder / "requests").touch()
    os.utime(folder, (time.time() - 3600,) * 2)
    return folder


def test_the_folders_of_dead_owners_are_removed_and_no_others(temporary):
    living = RunFolder()
    aged(temporary / os.path.basename(living.path))
    stale, young, other = aged(temporary / "mini-vllm-dead"), temporary / "mini-vllm-young", aged(temporary / "other")
    young.mkdir()
    target = aged(temporary / "target")
    (temporary / "mini-vllm-link").symlink_to(target)
    (temporary / "mini-vllm-file").touch()
    RunFolder().remove()
    assert not stale.exists()
    assert sorted(path.name for path in temporary.iterdir()) == sorted(
        [os.path.basename(living.path), young.name, other.name, target.name, "mini-vllm-link", "mini-vllm-file"]
    )
    assert (target / "requests").exists()
    living.remove()
    assert not os.path.exists(living.path)
    living.remove()


def test_a_folder_for_temporary_files_that_takes_none_is_named(temporary):
    temporary.rmdir()
    with pytest.raises(ConfigError, match=f"TMPDIR: cannot make a folder in {temporary}"):
        RunFolder()
