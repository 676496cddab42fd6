"""What answers held to a grammar cost: `python -m tests.gpu.bench_grammar`.

Of ROWS requests of gpt-oss-20b with random weights, 0, 1, 8 and all have a grammar: JSON that never ends, drawn at
temperature 1, of which a model with random weights makes the hardest. Prints, by kind of request, the tokens a second
of one, and the host's microseconds to make a step's masks.
"""

import statistics
import time

from conf.limits import VOCABULARY
from engine.grammar import Grammars
from engine.llm import LLM
from engine.messages import StepReport, Submit
from graphs.plan import SamplingParams
from serve.grammar import json_form, text_grammar
from tests.harness import prompt_of

ROWS, PROMPT, TOKENS = 64, 1024, 160
BUCKETS = (
    "decode_rows=[1,64]",
    "prefill_tokens=[8192]",
    "prefill_sequences=64",
    "prompt_logprobs=[]",
    "max_context=2048",
)
OVERRIDES = ["model=gpt-oss-20b", "model.weights=random", *(f"buckets.{bucket}" for bucket in BUCKETS)]
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "size": {"type": "number"},
        "kind": {"enum": ["small", "large", "neither"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
GRAMMAR = text_grammar(json_form({"type": "array", "items": ITEM, "minItems": 10000}, "")).text


class Timed(Grammars):
    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def fill(self, constraints, masks) -> None:
        begin = time.perf_counter()
        super().fill(constraints, masks)
        if constraints:
            self.seconds.append(time.perf_counter() - begin)


def measure(llm: LLM, constrained: int) -> str:
    grammars, arrivals = Timed(), {id: [] for id in range(ROWS)}
    core = llm.engine.core(lambda report: note(report, arrivals), None, prefix_cache=False)
    core._grammars = grammars
    grammars.compile(GRAMMAR).result()
    for id in range(ROWS):
        grammar = GRAMMAR if id < constrained else ""
        sampling = SamplingParams(max_tokens=TOKENS, seed=id, temperature=1.0, grammar=grammar)
        core.handle(Submit(id, prompt_of(PROMPT, VOCABULARY - 2000, id), sampling))
    while core.turn():
        pass
    begin = max(times[0] for times in arrivals.values())  # all run
    end = min(times[-1] for times in arrivals.values())
    kinds = {"with": range(constrained), "without": range(constrained, ROWS)}
    parts = [f"{constrained:>2} of {ROWS} with a grammar"]
    for kind, ids in kinds.items():
        if ids:
            tokens = statistics.mean(sum(begin < at <= end for at in arrivals[id]) for id in ids)
            parts.append(f"{kind}: {1e3 * (end - begin) / tokens:.2f} ms a token")
    if grammars.seconds:
        used = sorted(grammars.seconds)
        parts.append(f"masks of a step: median {1e6 * statistics.median(used):.0f} us, most {1e6 * used[-1]:.0f} us")
    return "; ".join(parts)


def note(report, arrivals: dict[int, list[float]]) -> None:
    assert isinstance(report, StepReport)
    now = time.perf_counter()
    for delta in report.deltas:
        assert delta.error is None, delta.error
        arrivals[delta.id] += [now] * len(delta.tokens)


def main() -> None:
    with LLM(OVERRIDES) as llm:
        for constrained in (0, 0, 1, 8, ROWS, 0):
            print(measure(llm, constrained), flush=True)


if __name__ == "__main__":
    main()
