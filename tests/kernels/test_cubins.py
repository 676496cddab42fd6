"""Every kernel of both models compiles, takes the registers and memory that it took before, and leaves the registers of
a product under way alone."""

import pytest

from engine.ahead import FOLDER
from tests.kernels import wgmma_hazards
from tests.kernels.cubins import all_units, compile_units, disassemble, nvcc_version, read_table, resources_of

needs_nvcc = pytest.mark.skipif(not nvcc_version(), reason="no nvcc on this machine")
WITH_PRODUCTS = {
    "prefill_attention",
    "prefill_linear",
    "prefill_experts_up",
    "prefill_experts_down",
    "stream_experts_up",
    "stream_experts_down",
    "tiled",
}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    return compile_units(all_units(), tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def listings(cubins):
    return {name: disassemble(path) for name, path in cubins.items()}


def test_every_file_is_compiled_ahead_for_some_unit():
    assert {unit.file for unit in all_units().values()} == {
        str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.cu")
    }


@needs_nvcc
def test_kernels_take_the_resources_of_the_table(cubins, listings):
    """Spills and lost occupancy are seen here before a GPU measures them. A change that is meant: run `python -m
    tests.kernels.cubins` and commit tests/kernels/resources.json."""
    table = read_table()
    if table.compiler != nvcc_version():
        pytest.skip(f"the table is nvcc {table.compiler}'s, this is nvcc {nvcc_version()}")
    actual = {name: resources_of(path, listings[name]) for name, path in cubins.items()}
    differences = [
        f"{name} {kernel}: {actual.get(name, {}).get(kernel)}, in the table {table.resources.get(name, {}).get(kernel)}"
        for name in sorted(actual.keys() | table.resources.keys())
        for kernel in sorted(actual.get(name, {}).keys() | table.resources.get(name, {}).keys())
        if actual.get(name, {}).get(kernel) != table.resources.get(name, {}).get(kernel)
    ]
    how = "if this is meant, run `python -m tests.kernels.cubins` and commit resources.json"
    assert not differences, "\n".join([*differences, how])


@needs_nvcc
def test_no_instruction_touches_the_registers_of_a_product_under_way(listings):
    with_products = set()
    for name, listing in listings.items():
        for kernel, report in wgmma_hazards.check(listing).items():
            assert not report.hazards, f"{name} {kernel}"
            if report.products:
                with_products.add(kernel)
    assert with_products == WITH_PRODUCTS
