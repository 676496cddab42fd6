"""How much JSON a body holds, counted while it arrives. Knows strings, brackets and commas; nothing of fields.

Decoding keeps the interpreter's lock until it ends: a body of many small values would stop every stream meanwhile.
"""

from serve.protocol import ApiError

# The official clients stay far below. Numbers are cheap: prompts of token ids are long lists.
MAX_VALUES = 300_000
MAX_STRINGS = 30_000  # keys included
MAX_CONTAINERS = 10_000  # lists and objects


class Bulk:
    """Counts the values of one body. What stands in strings does not count; exact for valid JSON."""

    def __init__(self) -> None:
        self._quotes = self._containers = self._commas = 0
        self._rest = b""  # a backslash whose escape is in the next piece

    def feed(self, piece: bytes) -> None:
        """The next piece of the body. Raises ApiError 400 once it holds more values than are decoded here.

        Each step is one pass over the bytes in C.
        """
        data = (self._rest + piece).replace(rb"\\", b"").replace(rb"\"", b"")  # quotes that are left delimit strings
        self._rest = data[-1:] if data.endswith(b"\\") else b""
        inside = self._quotes % 2
        self._quotes += _count(data, b'"')
        if self._quotes > 2 * MAX_STRINGS:
            raise _too_much("strings", MAX_STRINGS)
        outside = b"".join(data.split(b'"')[inside::2])
        self._containers += _count(outside, b"[{")
        self._commas += _count(outside, b",")
        if self._containers > MAX_CONTAINERS:
            raise _too_much("lists and objects", MAX_CONTAINERS)
        if self._containers + self._commas > MAX_VALUES:
            raise _too_much("values", MAX_VALUES)


def _count(data: bytes, which: bytes) -> int:
    return len(data) - len(data.translate(None, which))


def _too_much(kind: str, limit: int) -> ApiError:
    return ApiError(400, f"the body holds more than {limit} {kind}", code="body_too_complex")
