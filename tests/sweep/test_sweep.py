"""`python sweep.py` as a user runs it, over faked servers: real processes, real HTTP, real signals; what it resumes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sweep.environment import commit
from sweep.store import Store, read_rows
from tests.served import ROOT
from tests.sweep.fake_server import ANSWERS_WRONGLY, CRASHES, DOES_NOT_START, HANGS, IS_SLOW, WELL

SMALL = (
    "sweep.steps=false",
    "sweep.prompt_tokens=8",
    "sweep.output_tokens=5",
    "sweep.requests=2",
    "sweep.repeats=2",
    "sweep.gate_tokens=4",
    "sweep.stall_seconds=10",
    "hydra.sweep.dir=${sweep.folder}",
)


class Swept:
    def __init__(self, folder):
        self.folder = folder / "sweep"
        self.servers = folder / "servers"
        self.servers.touch()

    def start(self, *arguments):
        command = [sys.executable, "-m", "tests.sweep.faked", "-m", *SMALL, *arguments, f"sweep.folder={self.folder}"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"FAKE_SERVERS": str(self.servers)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments):
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def started(self):
        return [int(line.split()[0]) for line in self.servers.read_text().splitlines()]

    def kinds(self):
        return [int(line.split()[1]) for line in self.servers.read_text().splitlines()]

    def rows(self):
        return read_rows(self.folder)


@pytest.fixture
def swept(tmp_path):
    return Swept(tmp_path)


def wait_for(found, otherwise):
    """What `found` returns once it is not empty."""
    deadline = time.monotonic() + 120
    while not (result := found()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
    return result


def gone(processes):
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in processes):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)
    return True


def test_rounds_go_forth_and_back_and_every_repeat_has_a_server_of_its_own(swept):
    status, output = swept.run("server.max_queue=9,8", "sweep.concurrency=1,2", "sweep.repeats=4", "sweep.requests=1")
    assert status == 0, output
    assert swept.kinds() == [9, 8, 8, 9, 9, 8, 8, 9]  # A B B A, and the first is measured again at the end
    lines = [json.loads(line) for line in (swept.folder / "results.jsonl").read_text().splitlines()]
    forth = [(row["overrides"][0][-1], row["level"]) for row in lines[:4]]
    assert forth == [("9", 1), ("9", 2), ("8", 1), ("8", 2)]
    again = [(row["overrides"][0][-1], row["level"]) for row in lines]
    assert again == [*forth, *forth[::-1], *forth, *forth[::-1]]
    assert [row["status"] for row in lines] == ["partial"] * 12 + ["ok"] * 4
    assert [len(row["repeats"]) for row in swept.rows()] == [4] * 4


def test_a_failing_configuration_costs_its_own_rows_only_and_a_server_serves_all_its_loads(swept):
    kinds = (WELL, DOES_NOT_START, CRASHES, ANSWERS_WRONGLY)
    status, output = swept.run("sweep.concurrency=1,3", f"server.max_queue={','.join(map(str, kinds))}")
    assert status == 0, output
    rows = swept.rows()
    assert [row["status"] for row in rows] == ["ok", "ok", *["failed"] * 4, "wrong", "wrong"]
    assert [row["load"] for row in rows[:2]] == ["1 user", "3 users"]
    assert "cannot start: out of memory" in rows[2]["reason"]
    assert "rank 0 ended with signal SIGKILL" in rows[4]["reason"]
    assert "the baseline has 1000" in rows[6]["reason"]
    # What does not start, or crashes, is not tried again in the second round.
    assert swept.kinds() == [WELL, DOES_NOT_START, CRASHES, CRASHES, ANSWERS_WRONGLY, ANSWERS_WRONGLY, WELL]
    assert gone(swept.started())
    well = rows[1]
    assert (well["figures"]["requests"], well["figures"]["errors"]) == (2 * 3 * 3, 0)
    assert well["figures"]["prefix_hit_share"] == 0.25
    sent = 3 * 2 * (1 + 3)  # in each of two repeats a warm-up, and a first request
    assert well["buckets"] == [
        {"kind": "decode", "size": 4, "steps": 10 * sent, "rows_used": 30 * sent, "rows_padded": 10 * sent}
    ]
    assert well["start"]["capture"] == 0.25
    assert well["memory"] == {"pages": 2**20}
    report = (swept.folder / "report.md").read_text()
    assert "Keep `python serve.py`: there is nothing else to choose." in report
    assert "- server.max_queue=1028 is out at 1 user (prompt 0, token 0: 5000, the baseline has 1000" in report
    assert "defaults, 1 user, first and last of all: tpot_p50_ms" in report
    table = list(csv.DictReader((swept.folder / "results.csv").open()))
    assert [line["status"] for line in table] == [row["status"] for row in rows]
    assert float(table[1]["requests"]) == 18
    assert float(table[1]["n"]) == 12
    page = (swept.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page


def test_a_server_that_hangs_costs_its_row_and_open_loops_are_measured_too(swept):
    status, output = swept.run(
        f"server.max_queue={HANGS},{WELL}",
        "sweep.concurrency=[]",
        "sweep.rate=[50]",
        "sweep.seconds=1",
        "sweep.stall_seconds=3",
        "sweep.gate=false",
    )
    assert status == 0, output
    hung, well = swept.rows()
    assert hung["status"] == "failed"
    assert "the server hangs: nothing came for 3 s" in hung["reason"]
    assert (well["status"], well["load"]) == ("ok", "50 requests/s")
    assert gone(swept.started())


@pytest.mark.parametrize(("limit", "most", "status"), [(1e4, 12, "ok"), (1e4, 3, "undecided"), (1e-3, 12, "limits")])
def test_a_row_is_measured_on_until_its_limits_are_decided_or_its_budget_is_spent(swept, limit, most, status):
    """A limit that all requests keep takes 368 of them to pass, four repeats; one that all break is known before."""
    status_, output = swept.run(
        f"sweep.limits.ttft_ms={limit}", f"sweep.max_repeats={most}", "sweep.concurrency=10", "sweep.requests=10"
    )
    assert status_ == 0, output
    (row,) = swept.rows()
    assert row["status"] == status
    assert row["figures"]["n"] == {"ok": 400, "undecided": 300, "limits": 200}[status]


def test_what_is_finished_is_not_measured_again_unless_asked(swept):
    once = ("sweep.concurrency=1,2", "sweep.gate=false")
    assert swept.run(*once)[0] == 0
    first = swept.rows()
    status, output = swept.run(*once)
    assert status == 0, output
    assert len(swept.started()) == 2
    assert swept.rows() == first
    assert swept.run(*once, "sweep.dry_run=true")[1].count("measured before") == 2
    assert swept.run(*once, "sweep.fresh=true")[0] == 0
    assert len(swept.started()) == 4
    assert [row["key"] for row in swept.rows()] == [row["key"] for row in first]


def test_other_code_is_never_taken_for_the_same(tmp_path):
    assert commit(tmp_path) is None

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True, capture_output=True
        )

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    seen = [commit(tmp_path)]
    for name, text in (("a.py", "2"), ("new.py", "1"), ("new.py", "2")):
        (tmp_path / name).write_text(text)
        seen.append(commit(tmp_path))
    for target in ("a.py", ".", "nowhere"):  # new files that are links: to a file, a folder, nothing
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        seen.append(commit(tmp_path))
    (tmp_path / "nested").mkdir()
    subprocess.run(["git", "init", "-q", tmp_path / "nested"], check=True)
    seen.append(commit(tmp_path))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_leaves_valid_results_and_no_process(swept, number):
    process = swept.start("sweep.concurrency=1,4", f"server.max_queue={IS_SLOW}", "sweep.stall_seconds=1000")
    wait_for(swept.rows, "no row was finished")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert len(swept.started()) == 1
    assert gone(swept.started())
    (row,) = swept.rows()
    assert (row["status"], row["reason"]) == ("partial", "1 of 2 repeats were measured")
    assert "1 user" in (swept.folder / "report.md").read_text()


def test_a_sweep_that_is_killed_leaves_no_server(swept):
    process = swept.start("sweep.concurrency=4", f"server.max_queue={IS_SLOW}", "sweep.stall_seconds=1000")
    wait_for(swept.started, "no server was started")
    process.kill()
    process.communicate(timeout=60)
    assert gone(swept.started())


def test_a_sweep_that_is_killed_leaves_no_timing_of_steps(swept):
    process = swept.start("sweep.steps=true", "sweep.concurrency=1", "buckets=small")
    sweep = psutil.Process(process.pid)
    (timing,) = wait_for(lambda: [one for one in sweep.children() if "sweep.steps" in one.cmdline()], "no timing began")
    wait_for(timing.children, "no rank was started")
    left = [one.pid for one in sweep.children(recursive=True)]
    process.kill()
    process.communicate(timeout=60)
    assert gone(left)


def test_a_dry_run_prints_the_matrix_and_starts_nothing(swept):
    status, output = swept.run("buckets=small,latency", "tp=1,3", "sweep.concurrency=1,4", "sweep.dry_run=true")
    assert status == 0, output
    assert "8 rows" in output
    assert output.index("buckets=latency") > output.index("defaults")
    assert "tp: got 3, allowed: 1, 2, 4 or 8" in output
    assert not swept.started()


def test_the_objective_reaches_the_sweeper(swept):
    status, output = swept.run(
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1",
        f"server.max_queue=choice({WELL},{CRASHES})",
        "sweep.concurrency=[1,2]",
        "hydra/sweeper/sampler=grid",
        "sweep.objective=-tokens_per_s",
    )
    assert status == 0, output
    results = (swept.folder / "optimization_results.yaml").read_text()
    rates = [row["figures"]["tokens_per_s"] for row in swept.rows() if row["status"] == "ok"]
    assert len(rates) == 2
    assert f"best_value: {-min(rates)}" in results  # of a job with several loads the worst counts


def test_nonsense_is_refused_in_one_line(swept):
    for wrong, message in (
        ("sweep.concurrency=0", "sweep.concurrency: got 0, allowed: positive numbers"),
        ("sweep.objective=speed", "sweep.objective: got 'speed', allowed: requests"),
        ("sweep.compare=nowhere", "sweep.compare: got 'nowhere', allowed: a folder with the results.jsonl of a sweep"),
        ("sweep.repeats=3", "sweep.repeats: got 3, allowed: an even number"),
        ("sweep.max_repeats=1", "sweep.max_repeats: got 1, allowed: at least sweep.repeats = 2"),
        ("sweep.seconds=0", "sweep.seconds: got 0.0, allowed: more than 0"),
        ("sweep.prompts=nowhere.jsonl", "sweep.prompts: [Errno 2] No such file or directory: 'nowhere.jsonl'"),
    ):
        status, output = swept.run(
            wrong, f"sweep.dry_run={'true' if wrong.startswith(('sweep.objective', 'sweep.compare')) else 'false'}"
        )
        assert status == 1
        assert message in output, output
    assert not swept.started()


@pytest.mark.parametrize("dry", ["false", "true"])
def test_prompts_that_the_context_cannot_hold_start_no_server(swept, dry):
    status, output = swept.run(
        "sweep.prompt_tokens=8,100000", "sweep.concurrency=[1]", "sweep.requests=1", f"sweep.dry_run={dry}"
    )
    assert status == 0, output
    assert "got 100005, allowed: at most buckets.max_context" in output
    assert len(swept.started()) == 2 * (dry == "false")  # for the prompts that fit
    if dry == "false":
        assert sorted(row["status"] for row in swept.rows()) == ["failed", "ok"]


def test_rates_alone_are_open_loops_alone(swept):
    _, output = swept.run("sweep.rate=2,8", "sweep.dry_run=true")
    assert "2 rows" in output
    assert "8 requests/s" in output
    assert "users" not in output


def test_the_last_row_of_a_key_counts_and_a_failure_is_measured_again(tmp_path):
    for status, figures in (("failed", {}), ("ok", {"tpot_p50_ms": math.nan}), ("failed", {})):
        Store(tmp_path).add({"key": "a", "status": status, "figures": figures})
        assert (Store(tmp_path).finished("a") is None) == (status == "failed")
    assert [row["status"] for row in read_rows(tmp_path)] == ["failed"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["figures"] == {"tpot_p50_ms": None}


def test_a_note_appears_complete_and_leaves_nothing_else(tmp_path):
    store = Store(tmp_path)
    for value in ({"a": math.inf}, {"a": 1}):
        store.note("note.json", value)
    assert store.noted("note.json") == {"a": 1}
    assert store.noted("other.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]


def test_a_row_cut_short_by_a_crash_is_left_out(tmp_path):
    whole = json.dumps({"key": "a", "status": "ok"})
    (tmp_path / "results.jsonl").write_text(f'{whole}\n{{"key": "b", "sta')
    assert read_rows(tmp_path) == [{"key": "a", "status": "ok"}]
