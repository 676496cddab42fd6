"""Grammars that answers are held to: compiled, and followed token by token to masks of what may come next.

A grammar is a text in the form of llguidance (https://github.com/guidance-ai/llguidance), whose compiler and automaton
these are. Knows tokens; nothing of what a grammar is for, and no torch: the HTTP process uses it too.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from conf.limits import ENDOFTEXT, FIRST_SPECIAL, RETURN, VOCABULARY
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams

Mask = npt.NDArray[np.int32]
ENDS = (RETURN, ENDOFTEXT)  # may follow a whole answer
COMPILED = 64  # grammars that are kept


class GrammarError(ValueError):
    """A grammar that cannot be compiled; the message is the compiler's."""


class Compiler:
    """Grammars to automata at their start, over the vocabulary of GPT-OSS. Takes two seconds to make."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer(_Vocabulary(), eos_token=list(ENDS))  # type: ignore[arg-type]
        # What a grammar may cost: these bound the time of a compilation and of a mask. Messages tell no automaton.
        self._limits = LLParserLimits(verbose_errors=False)
        self.compile = lru_cache(COMPILED)(self._compile)

    def _compile(self, grammar: str) -> LLMatcher:
        """The automaton at the start of `grammar`; its users follow copies of it. Raises GrammarError."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return matcher


class _Vocabulary:
    """The tokens as LLTokenizer reads them: their bytes, which of them are control tokens, and an encoder."""

    is_tokenizer_wrapper = True
    eos_token_id = RETURN
    bos_token_id = None

    def __init__(self) -> None:
        tokenizer = Tokenizer()
        self.tokens = [tokenizer.token_bytes(token) for token in range(VOCABULARY)]
        self.special_token_ids = list(range(FIRST_SPECIAL, VOCABULARY))
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


class Constraint:
    """One answer's place in its grammar."""

    def __init__(self, start: LLMatcher, sampling: SamplingParams) -> None:
        """start: what `Compiler.compile` returned. Until min_tokens, tokens that stop give way to others."""
        self._matcher = start.deep_copy()
        self._drawn, self._min_tokens = 0, sampling.min_tokens
        self._stops = sampling.stop_token_ids

    @property
    def error(self) -> str:
        """Why the answer cannot go on: a grammar that turned out too complex. Empty where it can."""
        return self._matcher.get_error() if self._matcher.is_error() else ""

    def accept(self, token: int) -> bool:
        """The answer's next token -> whether it ends the answer."""
        self._drawn += 1
        if token in ENDS:
            return True
        self._matcher.consume_token(token)
        return False

    def item(self, row: int) -> tuple[LLMatcher, int]:
        """What `Masks` hands to llguidance: the automaton, and the row for its mask."""
        return self._matcher, row

    def finish(self, mask: Mask) -> None:
        """Make the automaton's mask [words] one to draw by."""
        if self._matcher.is_error():
            mask[:] = -1  # the token is drawn, and is the answer's last
        elif self._drawn < self._min_tokens:
            going_on = mask.copy()
            for token in self._stops:
                going_on[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
            if going_on.any():
                mask[:] = going_on


class Grammars:
    """The engine's: grammars are compiled in a thread beside the loop, and masks are made in several threads."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._compiler: Compiler | None = None
        self._executor: LLExecutor | None = None

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """The automaton at the start of `grammar`, or GrammarError."""
        return self._thread.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        self._compiler = self._compiler or Compiler()
        return self._compiler.compile(grammar)

    def fill(self, constraints: Sequence[Constraint], masks: Mask) -> None:
        """What each answer may go on with. masks [constraints, words] int32, contiguous: as in `TokenMasks`."""
        if not constraints:
            return
        self._executor = self._executor or LLExecutor()
        items = [constraint.item(row) for row, constraint in enumerate(constraints)]
        self._executor.unsafe_compute_mask_ptr(items, masks.ctypes.data, masks.strides[0], len(items))
        for constraint, mask in zip(constraints, masks, strict=True):
            constraint.finish(mask)
