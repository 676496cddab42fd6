"""The attacks of `make attack`, for some seconds each: a server takes them all and is as it was before."""

import pytest

from tests.attack.attacks import Attack, signals
from tests.attack.run import complaints, serve

SECONDS = 4


def test_a_server_under_attack_answers_loses_nothing_and_keeps_nothing(tmp_path):
    with serve(tmp_path / "log") as server:
        attack = Attack(server, seed=0)
        for kind in (attack.bodies, attack.sockets, attack.floods):
            kind(SECONDS)
        attack.aftermath()
        assert attack.findings + complaints(tmp_path / "log") == []
        assert attack.sent > 10


@pytest.mark.parametrize("seed", range(3))
def test_signals_at_any_moment_end_a_server_with_all_its_processes(seed):
    assert signals(seed) == []
