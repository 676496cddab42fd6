"""Finds uses of registers that belong to a wgmma still under way, in a listing of nvdisasm.

`wgmma.mma_async` reads its A registers and adds to its accumulators after the instruction has been issued, until
`wgmma.wait_group` has waited for its group. ptxas does not keep other instructions away from the A registers when
inline assembly hides what belongs together, so this walks every path of a kernel and reports what writes to an operand
of a product under way or reads its accumulators. In SASS a product is an HGMMA, the last of a group carries `gsb0`, and
`WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are left.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

SECTION = re.compile(r'\s*\.section\s+"?\.text\.([^",\s]+)')
LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z0-9_.a-z]+)\s*(.*?)\s*;")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.F32\.BF16")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
MOST_GROUPS = 8  # that are told apart; wgmma.wait_group leaves at most 7
PREDICATE = re.compile(r"U?P(?:\d|T|R)$")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations whose first operand is a register that they read, or no register at all.
WITHOUT_DESTINATION = _words(
    """
    ACQBULK ARRIVES BAR BRA BRX BSSY BSYNC CALL CCTL CGAERRBAR DEPBAR DSETP ELECT ENDCOLLECTIVE ERRBAR EXIT FCHK FENCE
    FSETP HSETP2 ISETP LDGDEPBAR LDGSTS MEMBAR NANOSLEEP NOP PLOP3 PREEXIT R2P R2UR RED REDUX RET S2UR ST STG STL STS
    STSM SYNCS UBLKCP UCGABAR_ARV UCGABAR_WAIT UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV UPLOP3 UPRMT USEL USETMAXREG
    USHF UTMALDG VOTEU WARPGROUP WARPSYNC YIELD
    """
)
WITH_DESTINATION = _words(
    """
    ATOM ATOMG ATOMS BREV CS2R F2F F2FP F2I F2IP FADD FFMA FLO FMNMX FMUL FSEL FSET HADD2 HFMA2 HMMA HMNMX2 HMUL2 HSET2
    I2F I2FP IABS IADD3 IMAD IMNMX LD LDC LDG LDL LDS LDSM LEA LOP3 MATCH MOV MOVM MUFU P2R POPC PRMT S2R SEL SGXT SHF
    SHFL VABSDIFF VABSDIFF4 VIADD VIADDMNMX VIMNMX VOTE
    """
)


@dataclass(frozen=True)
class Hazard:
    """An instruction that touches registers of a product under way."""

    address: int
    instruction: str
    registers: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Of one kernel."""

    products: int
    hazards: tuple[Hazard, ...]


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate that it is executed under, or ""
    name: str  # with modifiers
    operands: str

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]

    def __str__(self) -> str:
        return f"{self.guard} {self.name} {self.operands}".strip()


class Product(NamedTuple):
    """The registers of a wgmma under way."""

    inputs: frozenset[int]
    accumulators: frozenset[int]


class State(NamedTuple):
    """Products under way: those of committed groups, oldest first, and those not committed yet."""

    groups: tuple[frozenset[Product], ...] = ()
    uncommitted: frozenset[Product] = frozenset()

    @property
    def products(self) -> frozenset[Product]:
        return self.uncommitted.union(*self.groups)


def check(listing: str) -> dict[str, Report]:
    """Every kernel of a listing. Raises ValueError for an instruction beside a product that is not known here."""
    return {kernel: _check(*body) for kernel, body in _kernels(listing).items()}


def _kernels(listing: str) -> dict[str, tuple[list[Instruction], dict[str, int]]]:
    """By name: the instructions, and which of them each label stands before."""
    kernels: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if section := SECTION.match(line):
            instructions, labels = kernels.setdefault(section[1], ([], {}))
        elif label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            address, guard, name, operands = match.groups()
            instructions.append(Instruction(int(address, 16), guard or "", name, operands))
    return kernels


def _check(instructions: list[Instruction], labels: dict[str, int]) -> Report:
    """Follow every path, with every state in which an instruction can be reached."""
    hazards: dict[int, Hazard] = {}
    to_visit, seen = [(0, State())], set()
    while to_visit:
        place, state = to_visit.pop()
        if place >= len(instructions) or (place, state) in seen:
            continue
        seen.add((place, state))
        instruction = instructions[place]
        touched = _touched(instruction, state)
        if touched:
            hazards[place] = Hazard(instruction.address, str(instruction), tuple(sorted(touched)))
        after = _after(instruction, state)
        to_visit += [(following, after) for following in _next_places(instruction, place, labels)]
    count = sum(instruction.operation == "HGMMA" for instruction in instructions)
    return Report(count, tuple(hazards[place] for place in sorted(hazards)))


def _next_places(instruction: Instruction, place: int, labels: dict[str, int]) -> list[int]:
    targets = [labels[label] for label in re.findall(r"\.L_x_\d+", instruction.operands)]
    if instruction.operation in ("JMP", "JMX") or (instruction.operation == "BRX" and not targets):
        raise ValueError(f"{instruction}: a jump whose target is not in the listing")
    places = []
    # A BRX lists its targets in a comment. A WARPSYNC's are those of a collective, which comes back by a jump.
    if instruction.operation in ("BRA", "BRX", "CALL", "WARPSYNC"):
        places += targets
    unconditional = not instruction.guard and "P" not in instruction.operands
    ends = instruction.operation in ("EXIT", "RET", "BRA", "BRX") and unconditional
    if not ends or ".ANY" in instruction.name or ".DIV" in instruction.name or ".CONV" in instruction.name:
        places.append(place + 1)
    return places


def _after(instruction: Instruction, state: State) -> State:
    if product := _product(instruction):
        uncommitted = state.uncommitted | {product}
        if "gsb0" in instruction.operands:
            groups = (*state.groups, uncommitted)
            if len(groups) > MOST_GROUPS:  # a loop without a wait: the oldest are one, so that states are finite
                groups = (groups[0] | groups[1], *groups[2:])
            return State(groups)
        return State(state.groups, uncommitted)
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands.split(",")[1], 16)
        return State(state.groups[len(state.groups) - left :] if left else (), state.uncommitted)
    return state


def _product(instruction: Instruction) -> Product | None:
    if instruction.operation != "HGMMA":
        return None
    shape, operands = PRODUCT.match(instruction.name), instruction.operands.split(", ")
    accumulator, a = REGISTER.fullmatch(operands[0]), REGISTER.match(operands[1])
    if not shape or not accumulator:
        raise ValueError(f"{instruction}: not a product of bfloat16 with float32 sums")
    inputs = _registers(int(a[1]), 4) if a else frozenset()  # else A is in shared memory
    return Product(inputs, _registers(int(accumulator[1]), int(shape[1]) // 2))


def _touched(instruction: Instruction, state: State) -> frozenset[int]:
    """Registers of products under way that the instruction writes, and accumulators that it reads."""
    if not state.products:
        return frozenset()
    inputs = frozenset[int]().union(*(product.inputs for product in state.products))
    accumulators = frozenset[int]().union(*(product.accumulators for product in state.products))
    if product := _product(instruction):  # may add to sums that another product adds to: they are done in order
        return product.accumulators & inputs | product.inputs & accumulators
    written = _written(instruction)
    read = frozenset(int(number) for number in REGISTER.findall(instruction.operands)) - written
    return written & (inputs | accumulators) | read & accumulators


def _written(instruction: Instruction) -> frozenset[int]:
    operation = instruction.operation
    if operation in WITHOUT_DESTINATION:
        return frozenset()
    if operation not in WITH_DESTINATION:
        raise ValueError(f"{instruction}: whether it writes a register is not known here")
    for operand in instruction.operands.split(", "):
        if PREDICATE.match(operand):
            continue
        register = REGISTER.fullmatch(operand)
        return _registers(int(register[1]), _width(instruction)) if register else frozenset()
    return frozenset()


def _width(instruction: Instruction) -> int:
    """Registers of the destination."""
    modifiers = instruction.name.split(".")[1:]
    if "128" in modifiers or (instruction.operation in ("LDSM", "HMMA") and modifiers[-1] != "2"):
        return 4
    if "64" in modifiers or "WIDE" in modifiers or "2" in modifiers:
        return 2
    return 2 if instruction.operation == "CS2R" and "32" not in modifiers else 1


def _registers(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))
