"""Arithmetic worked digit by digit, as an analysis shows it; and how operands are drawn and named."""

from random import Random


def spaced(value: int | str) -> str:
    return " ".join(str(value))


def _places(*values: int) -> list[tuple[int, ...]]:
    """The digits of all values, from the right, filled with zeros."""
    width = max(len(str(value)) for value in values)
    return list(zip(*([int(digit) for digit in reversed(str(value).zfill(width))] for value in values), strict=True))


def add_steps(a: int, b: int) -> str:
    carry, steps, digits = 0, [], ""
    for x, y in _places(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{', '.join(steps)}; {spaced(('1' if carry else '') + digits)}"


def subtract_steps(a: int, b: int) -> str:
    """a >= b."""
    borrow, steps, digits = 0, [], ""
    for x, y in _places(a, b):
        top = x - borrow
        borrow = int(top < y)
        top += 10 * borrow
        steps.append(f"{top}-{y}={top - y}{' borrow' if borrow else ''}")
        digits = f"{top - y}{digits}"
    return f"{', '.join(steps)}; {spaced(digits)}"


def times_digit_steps(a: int, digit: int) -> str:
    carry, steps, digits = 0, [], ""
    for (x,) in _places(a):
        total = x * digit + carry
        steps.append(f"{x}*{digit}{f'+{carry}' if carry else ''}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{', '.join(steps)}; {spaced((str(carry) if carry else '') + digits)}"


def multiply_steps(a: int, b: int) -> str:
    """b of one or two digits."""
    if b < 10:
        return times_digit_steps(a, b)
    low, high = a * (b % 10), a * (b // 10) * 10
    return (
        f"times {b % 10}: {times_digit_steps(a, b % 10)}. times {b // 10}: {times_digit_steps(a, b // 10)} 0. "
        f"add: {add_steps(low, high)}"
    )


def divide_steps(a: int, digit: int) -> str:
    rest, steps, digits = 0, [], ""
    for figure in str(a):
        rest = rest * 10 + int(figure)
        steps.append(f"{rest}/{digit}={rest // digit} r{rest % digit}")
        digits, rest = f"{digits}{rest // digit}", rest % digit
    return f"{', '.join(steps)}; {spaced(digits)}"


def count_steps(a: int, b: int) -> str:
    """How often b, of two digits, goes into a, a multiple of up to 99 times: counted up in tens, then in ones."""
    tens, ones = divmod(a // b, 10)
    passed = [f"{10 * n}:{10 * n * b}" for n in range(1, tens + (ones > 0) + 1)]
    if not ones:
        return f"{' '.join(passed)}; {10 * tens}"
    steps, end = f"{' '.join(passed)} > {a}.", str(ones)
    if tens:
        most = 10 * tens * b
        steps += f" {a}-{most}: {subtract_steps(a, most)} = {a - most}."
        end = f"{10 * tens}+{ones}={a // b}"
    return f"{steps} {' '.join(f'{n}:{n * b}' for n in range(1, ones + 1))}; {end}"


def work(a: int, op: str, b: int) -> tuple[str, str]:
    """Steps and result of a op b, both from 0. A product has a factor below 100, a divisor is a digit."""
    if op == "+":
        return f"{add_steps(a, b)} = {a + b}.", str(a + b)
    if op == "-" and a >= b:
        return f"{subtract_steps(a, b)} = {a - b}.", str(a - b)
    if op == "-":
        return f"{b} is larger. {subtract_steps(b, a)} = {b - a}, negative.", str(a - b)
    if op == "*":
        wide, narrow = (a, b) if b < 10 or a >= 10 else (b, a)
        wide, narrow = (wide, narrow) if narrow < 100 else (narrow, wide)
        return f"{wide}*{narrow}: {multiply_steps(wide, narrow)} = {a * b}.", str(a * b)
    rest = f" remainder {a % b}" if a % b else ""
    return f"{divide_steps(a, b)} = {a // b}{rest}.", f"{a // b}{rest}"


def number(rng: Random, least: int = 0, digits: int = 3) -> int:
    """As many short as long ones."""
    return rng.randint(least, 10 ** rng.randint(1, digits) - 1)


def operands(rng: Random, op: str) -> tuple[int, int]:
    if op in "+-":
        return number(rng), number(rng)
    if op == "*":
        pair = (rng.randint(10, 99), rng.randint(10, 99)) if rng.random() < 0.5 else (number(rng), rng.randint(0, 9))
        return pair if rng.random() < 0.5 else pair[::-1]
    b = rng.randint(2, 9)
    return (b * rng.randint(1, 999 // b) if rng.random() < 0.7 else number(rng, 1)), b


def operand_key(a: int, op: str, b: int) -> str:
    """The same for a op b and b op a where they are the same."""
    return f"{op} {min(a, b)} {max(a, b)}" if op in "+*" else f"{op} {a} {b}"
