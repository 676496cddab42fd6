"""Commands of a cluster, stood in for: each call is recorded, and answers what the test has laid down for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDER = """#!{python}
import json, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
line = " ".join([name, *arguments])
call = {{"call": [name, *arguments]}}
if "--password-stdin" in arguments:
    call["stdin"] = sys.stdin.read()
if "--filename" in arguments:
    source = arguments[arguments.index("--filename") + 1]
    call["manifest"] = sys.stdin.read() if source == "-" else pathlib.Path(source).read_text()
with open(folder / "calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
for words, status, output in json.loads((folder / "answers").read_text()):
    if all(word in line for word in words):
        print(output, file=sys.stderr if status else sys.stdout)
        sys.exit(status)
if arguments[:1] == ["kustomize"] and {kubectl!r}:
    sys.exit(subprocess.run([{kubectl!r}, *arguments]).returncode)
"""


class Workplace:
    """A small repository with the deploy folder, and a PATH on which docker, kubectl and aws only record."""

    def __init__(self, folder: Path) -> None:
        self.root, self._bin = folder / "repository", folder / "bin"
        self._record = folder / "record"
        for path in (self._bin, self._record, self.root):
            path.mkdir()
        self.answers = []
        shutil.copytree(ROOT / "deploy", self.root / "deploy", ignore=shutil.ignore_patterns("credentials.sh"))
        for name in ("pyproject.toml", ".gitignore", ".dockerignore"):
            shutil.copy(ROOT / name, self.root)
        for name in ("docker", "kubectl", "aws"):
            path = self._bin / name
            path.write_text(
                RECORDER.format(python=sys.executable, folder=str(self._record), kubectl=shutil.which("kubectl"))
            )
            path.chmod(0o755)
        example = self.root / "deploy/aws/credentials.sh.example"
        shutil.copy(example, self.root / "deploy/aws/credentials.sh")
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
            self.git(*arguments)
        self.commit = self.git("rev-parse", "--short=12", "HEAD")

    def git(self, *arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *who, *arguments], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def answer(self, *words: str, status: int = 0, output: str = "") -> None:
        """For calls that hold all these words; the first that fits counts, and else 0 and nothing."""
        self.answers.append([words, status, output])

    def shell(self, line: str, **environment: str) -> subprocess.CompletedProcess:
        """A line as a user types it, in the repository, in an environment with nothing of ours."""
        (self._record / "answers").write_text(json.dumps(self.answers))
        clean = {"PATH": f"{self._bin}:{os.environ['PATH']}", "HOME": str(self.root.parent), **environment}
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.root,
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def sourced(self, line: str, **environment: str) -> subprocess.CompletedProcess:
        return self.shell(f"source deploy/aws/credentials.sh && source deploy/aws/env.sh && {line}", **environment)

    @property
    def records(self) -> list[dict]:
        path = self._record / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def calls(self) -> list[str]:
        return [" ".join(record["call"]) for record in self.records]
