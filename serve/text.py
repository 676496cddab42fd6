"""Text to token ids and back: the tokenizer, incremental UTF-8 and stop strings.

The vocabulary (o200k_harmony) is a constant of GPT-OSS and comes with the harmony library: no file, no network.
Knows nothing of HTTP, of messages or of channels.
"""

import codecs
import re
from collections.abc import Iterator
from functools import cache

from openai_harmony import HarmonyEncoding, load_harmony_encoding

from conf.limits import FIRST_SPECIAL, VOCABULARY

# The library's encoder takes time quadratic in the length of one pre-token and holds the interpreter lock meanwhile:
# 200,000 times the same letter would stop the server for 14 s. So it sees slices, cut where a pre-token surely ends
# (after a letter, before a space or a stop), and a run that may be one pre-token is cut after RUN characters. Such runs
# (letters without a break, signs or blanks without a letter) are the only text that encodes otherwise than in one go.
SLICE = 16384
RUN = 512
_CJK_STOPS = r"\u3001\u3002\uff0c"
_BREAK = re.compile(rf"(?<=[^\W\d_])[ \n,.{_CJK_STOPS}]")
_RUN = re.compile(rf"[^\s\d!-/:-@\[-`{{-~{_CJK_STOPS}]{{{RUN},}}|[\W_]{{{RUN},}}")


def slices(text: str) -> Iterator[str]:
    """Consecutive parts of `text`, each cheap to encode."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > 2 * SLICE:
            found = _BREAK.search(text, start + SLICE, start + 2 * SLICE)
            end = found.start() if found else start + 2 * SLICE
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
        for part in slices(text):
            ids += self.encoding.encode(part, disallowed_special=())
            if limit is not None and len(ids) > limit:
                break
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; those of U+FFFD where no token has this id."""
        if not 0 <= token < VOCABULARY:
            return b"\xef\xbf\xbd"
        return self.encoding.decode([token], errors="surrogateescape").encode("utf-8", "surrogateescape")

    def token_text(self, token: int) -> str:
        """One token alone, as logprobs name it: `bytes:\\xe2\\x80` where it is no whole UTF-8."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        kept = (token for token in tokens if not (skip_special and token >= FIRST_SPECIAL))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")


def utf8_decoder() -> codecs.IncrementalDecoder:
    """Bytes to text as they arrive: an incomplete character is held back, an invalid one becomes U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace")


class StopStrings:
    """An Aho-Corasick automaton over some stop strings; immutable, shared by the choices of a request.

    A character costs the same however many and however long the strings are: a client chooses both.
    """

    def __init__(self, strings: list[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match = [0]  # by state: length of the longest stop string that ends here, 0 for none
        for string in strings:
            state = 0
            for character in string:
                if character not in self.children[state]:
                    self.children[state][character] = len(self.children)
                    self.children.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.match.append(0)
                state = self.children[state][character]
            self.match[state] = len(string)
        self.fallback = [0] * len(self.children)
        level = list(self.children[0].values())
        while level:
            next_level = []
            for state in level:
                for character, child in self.children[state].items():
                    self.fallback[child] = self.step(self.fallback[state], character)
                    self.match[child] = self.match[child] or self.match[self.fallback[child]]
                    next_level.append(child)
            level = next_level

    def step(self, state: int, character: str) -> int:
        """The state after `character`: as deep as the longest tail of the text that begins a stop string."""
        while state and character not in self.children[state]:
            state = self.fallback[state]
        return self.children[state].get(character, 0)


class StopMatcher:
    """Searches one text, as it arrives, for the first stop string to be completed, and cuts the text there.

    Where several are completed by the same character, the longest is cut off. The result depends on the text alone,
    not on the pieces in which it arrived.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0
        self._held = ""  # the longest tail of the text that may become a stop string
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that can no longer be part of a stop string. Empty after a stop string."""
        if self.stopped:
            return ""
        pending = self._held + text
        if len(self._stops.children) == 1:
            return pending
        for position, character in enumerate(text, len(self._held) + 1):
            self._state = self._stops.step(self._state, character)
            if length := self._stops.match[self._state]:
                self.stopped, self._held = True, ""
                return pending[: position - length]
        visible = len(pending) - self._stops.depth[self._state]
        self._held = pending[visible:]
        return pending[:visible]

    def finish(self) -> str:
        """The text held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held
