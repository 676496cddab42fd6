"""Text as it grows: incremental UTF-8, names of tokens, stop strings. Knows nothing of HTTP, messages or channels."""

import codecs
from collections.abc import Callable

from engine.tokenizer import Tokenizer


def utf8_decoder() -> codecs.IncrementalDecoder:
    """Bytes to text as they arrive: an incomplete character is held back, an invalid one becomes U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace")


def token_names(tokenizer: Tokenizer, as_ids: bool | None) -> Callable[[int], str]:
    """How log probabilities name a token: by its text, or as `token_id:5`."""
    return (lambda token: f"token_id:{token}") if as_ids else tokenizer.token_text


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
        self.stop_string = ""  # the one that was completed

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
                self.stop_string = pending[position - length : position]
                return pending[: position - length]
        visible = len(pending) - self._stops.depth[self._state]
        self._held = pending[visible:]
        return pending[:visible]

    def finish(self) -> str:
        """The text held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held
