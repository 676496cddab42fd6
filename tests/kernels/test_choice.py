"""Which kernels run where, the errors where they cannot, and that both sets keep the contract of kernels.ops."""

import inspect

import pytest
import torch

from kernels import choose, hopper, reference
from kernels.ops import KernelSet, Operations, UnsupportedError

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
    assert choose("auto", CPU, torch.float32) is reference
    assert choose("auto", CUDA, torch.bfloat16) is hopper
    assert choose("hopper", CUDA, torch.bfloat16) is hopper
    assert choose("reference", CUDA, torch.bfloat16) is reference


def test_hopper_kernels_on_another_device_are_refused_by_its_name(gpu):
    gpu(8, 0)
    with pytest.raises(UnsupportedError, match=r"got auto, allowed: reference on NVIDIA Something") as caught:
        choose("auto", CUDA, torch.bfloat16)
    assert caught.value.argument == "name"
    with pytest.raises(UnsupportedError, match=r"got hopper, allowed: reference on a CPU"):
        choose("hopper", CPU, torch.bfloat16)


def test_hopper_kernels_in_float32_are_refused(gpu):
    gpu(9, 0)
    with pytest.raises(UnsupportedError, match=r"got float32, allowed: bfloat16") as caught:
        choose("auto", CUDA, torch.float32)
    assert caught.value.argument == "dtype"


def test_the_reference_does_not_join_several_gpus():
    class TwoRanks:
        rank, size = 0, 2

    with pytest.raises(UnsupportedError, match="got 2, allowed: 1 with reference kernels on a GPU") as caught:
        reference.join(TwoRanks(), 1, 1, 1, 1, 32, CUDA)
    assert caught.value.argument == "ranks"


def public(protocol):
    """The methods that a protocol asks for."""
    return [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]


def signature(function):
    """Names, order, kinds, defaults and types of a function's parameters, and the type of its result."""
    whole = inspect.signature(function, eval_str=True)
    parameters = [(p.name, p.kind, p.default, p.annotation) for p in whole.parameters.values() if p.name != "self"]
    return parameters, whole.return_annotation


@pytest.mark.parametrize("kernels", [reference, hopper], ids=["reference", "hopper"])
def test_both_sets_have_the_signatures_of_the_contract(kernels):
    implementations = [(KernelSet, kernels), (Operations, kernels.decode), (Operations, kernels.prefill)]
    for protocol, implementation in implementations:
        assert public(protocol)
        for name in public(protocol):
            assert signature(getattr(implementation, name)) == signature(getattr(protocol, name)), name


def test_a_set_is_named_as_in_the_configuration():
    assert (reference.name, hopper.name) == ("reference", "hopper")
