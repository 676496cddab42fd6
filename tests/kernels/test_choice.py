"""Which kernels run where, and what is said where they cannot."""

import pytest
import torch

from conf.schema import ConfigError, Kernels
from kernels import choose, hopper, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to a GPU of a compute capability."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")

    return pretend


def test_auto_is_the_reference_on_a_cpu_and_hopper_on_a_hopper_gpu(gpu):
    gpu(9, 0)
    assert choose(Kernels.auto, CPU, torch.float32) is reference
    assert choose(Kernels.auto, CUDA, torch.bfloat16) is hopper
    assert choose(Kernels.reference, CUDA, torch.bfloat16) is reference


def test_hopper_kernels_on_another_device_are_refused_by_its_name(gpu):
    gpu(8, 0)
    with pytest.raises(ConfigError, match=r"kernels\.name.*NVIDIA Something"):
        choose(Kernels.auto, CUDA, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"kernels\.name.*a CPU"):
        choose(Kernels.hopper, CPU, torch.bfloat16)


def test_hopper_kernels_in_float32_are_refused(gpu):
    gpu(9, 0)
    with pytest.raises(ConfigError, match=r"kernels\.dtype: got float32"):
        choose(Kernels.auto, CUDA, torch.float32)


def test_both_have_the_operations_that_the_model_calls():
    for name in hopper.__all__:
        assert callable(getattr(reference, name)), name
