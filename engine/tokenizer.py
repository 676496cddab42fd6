"""Text to token ids and back.

The vocabulary (o200k_harmony) is a constant of GPT-OSS and comes with the harmony library: no file, no network.
Knows nothing of messages or channels, and imports no torch: the HTTP process uses it too.
"""

import re
from collections.abc import Iterator
from functools import cache

from openai_harmony import HarmonyEncoding, load_harmony_encoding

from conf.limits import FIRST_SPECIAL, VOCABULARY

# The library's encoder takes time quadratic in the length of one pre-token and holds the interpreter lock meanwhile:
# 200,000 times the same letter would stop the server for 14 s. So it gets slices, cut where a pre-token surely ends
# (after a letter, before a space or a stop), and a run that may be one pre-token is cut after RUN characters. Only such
# runs (letters without a break, signs or blanks without a letter) encode otherwise than the whole text would.
SLICE = 16384
RUN = 512
_CJK_STOPS = r"\u3001\u3002\uff0c"
_BREAK = re.compile(rf"(?<=[^\W\d_])[ \n,.{_CJK_STOPS}]")
_RUN = re.compile(rf"[^\s\d!-/:-@\[-`{{-~{_CJK_STOPS}]{{{RUN},}}|[\W_]{{{RUN},}}")


def slices(text: str) -> Iterator[str]:
    """Consecutive slices of `text`, each cheap to encode."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > 2 * SLICE:
            pre_token_end = _BREAK.search(text, start + SLICE, start + 2 * SLICE)
            end = pre_token_end.start() if pre_token_end else start + 2 * SLICE
        for run in _RUN.finditer(text, start, end):
            for cut in range(run.start() + RUN, run.end(), RUN):
                yield text[start:cut]
                start = cut
        yield text[start:end]
        start = end


@cache
def _encoding() -> HarmonyEncoding:
    return load_harmony_encoding("HarmonyGptOss")  # takes 0.3 s, and is the same for ever


class Tokenizer:
    """Text to token ids and back. Control tokens in text are text: `<|end|>` encodes as five ordinary tokens."""

    def __init__(self) -> None:
        self.encoding = _encoding()

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """`text` -> ids. Stops early once there are more than `limit`, so that no input takes long to refuse."""
        ids: list[int] = []
        for piece in slices(text):
            ids += self.encoding.encode(piece, disallowed_special=())
            if limit is not None and len(ids) > limit:
                break
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; those of U+FFFD where no token has this id."""
        if not 0 <= token < VOCABULARY:
            return b"\xef\xbf\xbd"
        text: str = self.encoding.decode([token], errors="surrogateescape")
        return text.encode("utf-8", "surrogateescape")

    def token_text(self, token: int) -> str:
        """One token alone, as logprobs name it: `bytes:\\xe2\\x80` where it is no whole UTF-8."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        """The text of all tokens, or of all but control tokens; bytes that are no UTF-8 become U+FFFD."""
        kept = (token for token in tokens if not (skip_special and token >= FIRST_SPECIAL))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
