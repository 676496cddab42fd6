"""What a reply says of a prompt's tokens: their log probabilities, in the form of vLLM's `prompt_logprobs`.

An entry a token of the prompt: null for the first, which nothing stands before; for each other an object by token id,
of the token itself and of the likeliest in its place.
"""

import msgspec

from engine.messages import PromptLogprobs
from engine.tokenizer import Tokenizer


class RankedLogprob(msgspec.Struct):
    """A token's natural-log probability, and its place among all tokens, from 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptEntry = dict[str, RankedLogprob] | None  # by token id


class PromptReader:
    """The entries of one prompt, as a choice's Deltas bring them."""

    def __init__(self, tokens: list[int], top: int, tokenizer: Tokenizer) -> None:
        """`top`: how many of the likeliest tokens an entry holds beside the token itself."""
        self._tokens, self._top, self._name = tokens, top, tokenizer.token_text
        self.entries: list[PromptEntry] = [None]

    def feed(self, found: list[PromptLogprobs]) -> None:
        """Log probabilities of the prompt's next tokens."""
        for logprobs in found:
            token = self._tokens[len(self.entries)]
            best = zip(logprobs.top_ids[: self._top], logprobs.top_logprobs[: self._top], strict=True)
            ranked = [(token, logprobs.logprob, logprobs.rank)]
            ranked += [(id, logprob, rank) for rank, (id, logprob) in enumerate(best, 1)]
            self.entries.append({str(id): RankedLogprob(logprob, rank, self._name(id)) for id, logprob, rank in ranked})
