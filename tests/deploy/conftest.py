import pytest

from tests.deploy.standins import Workplace


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)
