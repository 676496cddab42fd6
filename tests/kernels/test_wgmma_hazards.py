"""The checker of wgmma's registers, on listings written by hand."""

import pytest

from tests.kernels.wgmma_hazards import check

PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24"  # A: R4-R7, sums: R24-R39
LAST = f"{PRODUCT}, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines):
    code = '\t.section\t.text.product,"ax",@progbits\n.text.product:\n'
    for number, line in enumerate(lines):
        code += f"{line}\n" if line.endswith(":") else f"        /*{16 * number:04x}*/                   {line} ;\n"
    return code


def hazards(*lines):
    """(instruction, registers) of each."""
    found = check(listing(*lines, "EXIT"))["product"].hazards
    return [(hazard.instruction, hazard.registers) for hazard in found]


def test_an_operand_made_after_the_wait_is_right():
    assert hazards("MOV R4, R0", PRODUCT, LAST, "MOV R8, R0", WAIT, "LDS.128 R4, [R1]", "FADD R40, R24, R25") == []


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("MOV R7, R0", (7,)),
        ("@!P0 MOV R7, R0", (7,)),
        ("LDS.128 R4, [R1]", (4, 5, 6, 7)),
        ("LDG.E.64 R6, desc[UR4][R2.64]", (6, 7)),
        ("IMAD.WIDE R6, R0, 0x2, R2", (6, 7)),
        ("LOP3.LUT P0, R5, R0, R1, RZ, 0xc0, !PT", (5,)),
        ("SHFL.IDX PT, R4, R0, R1, 0x1f", (4,)),
        ("CS2R R6, SRZ", (6, 7)),
        ("MOV R39, R0", (39,)),  # a sum
        ("FADD R40, R24, R25", (24, 25)),
        ("STS [R1], R30", (30,)),
    ],
)
def test_an_instruction_that_touches_a_product_under_way_is_reported(instruction, registers):
    assert hazards(PRODUCT, LAST, instruction, WAIT) == [(instruction, registers)]
    assert hazards(PRODUCT, instruction, LAST, WAIT) == [(instruction, registers)]  # not committed yet
    assert hazards(PRODUCT, LAST, WAIT, instruction) == []


@pytest.mark.parametrize(
    "instruction",
    [
        "STS [R1], R4",
        "ISETP.GT.AND P0, PT, R4, R5, PT",
        "R2UR UR4, R4",
        "MOV R8, R4",
        "BAR.SYNC.DEFER_BLOCKING R4, 0x80",
    ],
)
def test_reading_an_operand_is_allowed(instruction):
    assert hazards(PRODUCT, LAST, instruction, WAIT) == []


def test_products_may_follow_each_other_on_the_same_sums():
    assert hazards(PRODUCT, LAST, PRODUCT, LAST, WAIT) == []


def test_a_products_sums_may_not_be_anothers_operand():
    over_operand = "HGMMA.64x32x16.F32.BF16 R4, R48, gdesc[UR8], R4, gsb0"
    assert hazards(LAST, over_operand, WAIT) == [(over_operand, (4, 5, 6, 7))]


def test_a_wait_leaves_the_newest_groups_under_way():
    other = "HGMMA.64x32x16.F32.BF16 R56, R8, gdesc[UR8], R56, gsb0"
    one_left = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert hazards(LAST, other, one_left, "MOV R4, R0", WAIT) == []
    assert hazards(LAST, other, one_left, "MOV R8, R0", WAIT) == [("MOV R8, R0", (8,))]


def test_a_product_under_way_is_followed_around_a_loop():
    loop = (".L_x_1:", "MOV R4, R0", LAST, "@P0 BRA `(.L_x_1)", WAIT)
    assert hazards(*loop) == [("MOV R4, R0", (4,))]
    assert hazards(".L_x_1:", "MOV R4, R0", LAST, WAIT, "@P0 BRA `(.L_x_1)") == []


def test_a_branch_around_the_wait_is_followed():
    assert hazards(LAST, "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", "MOV R4, R0") == [("MOV R4, R0", (4,))]
    assert hazards(LAST, WAIT, "BRA `(.L_x_1)", "MOV R4, R0", LAST, ".L_x_1:", "MOV R4, R0") == []


def test_a_table_of_jumps_is_followed_to_all_its_targets():
    table = 'BRX R6 -0x210 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'
    assert hazards(LAST, table, "MOV R4, R0", ".L_x_1:", WAIT, ".L_x_2:", "MOV R5, R0") == [("MOV R5, R0", (5,))]
    with pytest.raises(ValueError, match="not in the listing"):
        hazards(LAST, "BRX R6 -0x210", WAIT)


def test_an_instruction_that_is_not_known_here_is_refused():
    with pytest.raises(ValueError, match="FROBNICATE"):
        hazards(LAST, "FROBNICATE R4, R0", WAIT)
    assert hazards(LAST, WAIT, "FROBNICATE R4, R0") == []
