"""The Dockerfile: linted, and what of its stages needs no GPU and no Docker carried out from its own lines."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import httpx
import pytest

from kernels import build
from tests.served import free_port

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
START_SECONDS = 120


def stages():
    """Instructions [(name, rest)] of each stage, by name; lines that go on are joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    by_name, current = {}, []  # what stands before the first stage is in none
    for line in text.replace("\\\n", "").splitlines():
        if not line.strip():
            continue
        name, rest = line.split(None, 1) if " " in line else (line, "")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            current = by_name.setdefault(stage, [("FROM", base)])
        else:
            current.append((name, rest.strip()))
    return by_name


def copies(stage):
    """(sources, destination) of what comes from the repository."""
    lines = [rest.split() for name, rest in stages()[stage] if name == "COPY" and not rest.startswith("--from")]
    return [(words[:-1], words[-1]) for words in lines]


def in_context(path):
    """Whether .dockerignore leaves this file in the build context: of the lines that match it, the last one decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and _matches(path, pattern):
            kept = line.startswith("!")
    return kept


def _matches(path, pattern):
    """As Docker does: a pattern names a file or a folder with all that it holds; `**/` is any folder, also none."""
    above = [*path.parents][:-1]
    expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return any(re.fullmatch(expression, part.as_posix()) for part in (path, *above))


def copy_stage(stage, to):
    """The files that the stage's COPY lines bring from the build context."""
    for sources, destination in copies(stage):
        for source in sources:
            folder = to / destination if (ROOT / source).is_dir() else None
            for path in sorted((folder and (ROOT / source).rglob("*")) or [ROOT / source]):
                if not path.is_file() or not in_context(path.relative_to(ROOT)):
                    continue
                if folder:
                    target = folder / path.relative_to(ROOT / source)
                else:
                    target = to / destination / path.name if destination.endswith("/") else to / destination
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def value(stage, instruction):
    (rest,) = [rest for name, rest in stages()[stage] if name == instruction]
    return rest


def environment(stage):
    return dict(pair.split("=", 1) for name, rest in stages()[stage] if name == "ENV" for pair in rest.split())


def test_the_dockerfile_passes_the_linter():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_three_stages_and_the_last_takes_nothing_but_cubins_from_the_compilers():
    built = stages()
    assert list(built) == ["essentials", "cuda", "server"]
    assert value("server", "FROM") == value("cuda", "FROM") == "essentials"
    taken = [rest for name, rest in built["server"] if name == "COPY" and rest.startswith("--from")]
    assert taken == ["--from=cuda /cubins kernels/cubins"]
    assert build.AHEAD == ROOT / "kernels" / "cubins"
    for stage in ("essentials", "server"):
        assert not any(re.search(r"apt-get|nvcc|g\+\+", rest) for _, rest in built[stage])


def test_code_comes_after_everything_slow():
    for stage in ("essentials", "cuda"):
        assert not any(source in ("serve", "serve.py", "engine") for sources, _ in copies(stage) for source in sources)
    names = [f"{name} {rest}" for name, rest in stages()["server"]]
    assert names.index("COPY --from=cuda /cubins kernels/cubins") < names.index("COPY serve serve")
    changes_always = [place for place, line in enumerate(names) if "REVISION" in line]
    assert min(changes_always) > max(place for place, line in enumerate(names) if line.startswith(("RUN", "COPY")))


def test_the_image_stops_by_the_signal_that_drains_and_is_not_root():
    assert value("server", "STOPSIGNAL") == "SIGTERM"
    assert value("server", "USER") == "10001:10001"
    assert "/health" in value("server", "HEALTHCHECK")
    labels = value("server", "LABEL")
    assert all(f"org.opencontainers.image.{label}=" in labels for label in ("title", "licenses", "version", "revision"))


def test_what_is_copied_is_what_the_build_context_holds():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    wanted = {source for stage in stages() for sources, _ in copies(stage) for source in sources}
    assert all(source in allowed or source.split("/")[0] in allowed for source in wanted)
    assert allowed <= wanted
    assert all((ROOT / source).exists() for source in wanted)


def test_the_image_has_every_package_and_nothing_that_only_tests_trains_or_documents(tmp_path):
    copy_stage("server", tmp_path)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {"conf", "demo", "engine", "graphs", "kernels", "serve", "sweep"} <= packages
    assert packages <= {path.parent.name for path in tmp_path.glob("*/__init__.py")}
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "demo/model.safetensors",
        "demo/bundle.py",
        "serve.py",
        "sweep.py",
        "README.md",
        "conf/config.yaml",
    } <= files
    assert {name for name in files if name.endswith(".cu")}
    left_out = ("tests", "docs", "benchmarks", "demo/training", "kernels/cubins", ".git")
    assert not [name for name in files for folder in left_out if name.startswith(f"{folder}/")]
    assert {name for name in files if name.endswith(".md")} == {"README.md"}


def test_the_dependencies_that_essentials_installs_are_those_of_the_server_and_of_sweeps():
    (line,) = [rest for name, rest in stages()["essentials"] if name == "RUN"]
    command = line[: line.index("> requirements.txt")]
    listed = subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable, 1)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hopper"], *extras["sweep"], "setuptools"]
    assert [line for line in listed if line] == wanted


def test_what_only_the_image_has_is_pinned():
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    (line,) = [rest for name, rest in stages()["cuda"] if name == "RUN" and "nvcc" in rest]
    assert set(line.split("--target /opt/nvcc")[1].split()) <= pinned
    assert {"cuda-core", "cuda-bindings", "setuptools"} <= pinned


def test_the_files_that_the_cuda_stage_has_are_enough_to_compile(tmp_path):
    copy_stage("cuda", tmp_path)
    (line,) = [rest for name, rest in stages()["cuda"] if name == "RUN" and "engine.ahead" in rest]
    assert line == "python -m engine.ahead --to /cubins"
    code = "from engine.ahead import *; s = Architecture.from_random_shape(RandomShape()); print(len(units(s, 0, 1)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


# Root may write what it likes; without capabilities it is bound by a file's mode, as the image's user is.
BOUND = [] if os.getuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.fixture
def container():
    """The server stage's files, read-only, and /tmp and /cache to write. Under a short name: it holds sockets."""
    folder = Path(tempfile.mkdtemp(prefix="image-"))
    app = folder / "app"
    copy_stage("server", app)
    for name in ("tmp", "cache"):
        (folder / name).mkdir()
    for path in (app, *app.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield folder
    for path in (app, *(path for path in app.rglob("*") if path.is_dir())):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_the_tree_is_really_read_only(container):
    done = subprocess.run([*BOUND, "touch", container / "app/kernels/new"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "denied" in done.stderr


def test_the_server_starts_in_a_read_only_tree_serves_and_drains(container):
    given = environment("server")
    assert given["HOME"] == given["XDG_CACHE_HOME"] == "/cache"
    app, port = container / "app", free_port()
    before = {path: path.stat().st_mtime_ns for path in app.rglob("*")}
    entrypoint = json.loads(value("server", "ENTRYPOINT"))
    process = subprocess.Popen(
        [*BOUND, *entrypoint, f"server.port={port}", "model=demo"],
        cwd=app,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "TMPDIR": str(container / "tmp"),
            **{name: setting.replace("/cache", str(container / "cache")) for name, setting in given.items()},
        },
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                pass
            time.sleep(0.1)
        assert process.poll() is None, process.stdout.read()
        body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"].strip().startswith("Paris")
        (folder,) = (container / "tmp").iterdir()  # of this start
        assert [path.name[:9] for path in folder.iterdir()] == ["mini-vllm"]
        health = json.loads(value("server", "HEALTHCHECK").split("CMD", 1)[1])
        health[-1] = health[-1].replace("8000", str(port))
        subprocess.run([sys.executable, *health[1:]], check=True, timeout=60)
        process.send_signal(signal.SIGTERM)  # the server itself is the process that gets it: no shell is left before it
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    assert {path: path.stat().st_mtime_ns for path in app.rglob("*")} == before
    assert (container / "cache" / "mini-vllm").is_dir()
