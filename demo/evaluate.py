"""Held-out exact match by skill: greedy answers of a running server, or of anything that continues token ids.

python -m demo.evaluate --url http://127.0.0.1:8000 --count 20
"""

import argparse
import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from openai_harmony import Role

from demo.data import ROW, document, evaluation, tokenizer
from demo.skills import SKILLS, Example
from serve.harmony import CALL, ENDOFTEXT, RETURN, Parser, any_call_header

Continue = Callable[[list[list[int]]], list[list[int]]]  # prompts -> what follows each, its stop token included


class Verdict(NamedTuple):
    right: bool
    valid: bool  # the harmony library reads it, and it ends as a turn does
    analysis: int  # characters


def judge(e: Example, said: list[int]) -> Verdict:
    t = tokenizer()
    if e.text[0]:
        text = t.decode(said, skip_special=True)
        return Verdict(text == e.text[1], said[-1:] == [ENDOFTEXT], 0)
    begun = any_call_header(t) if e.call and not e.analysis else []
    try:
        t.encoding.parse_messages_from_completion_tokens([*begun, *said], Role.ASSISTANT)
        valid = said[-1:] == [CALL if e.call else RETURN] or said[-1:] == [RETURN]
    except Exception:  # the library raises several kinds
        valid = False
    parser = Parser(t, begun)
    texts, calls = {"reasoning": "", "content": "", "call": "", "hidden": ""}, set()
    for event in [*map(parser.feed, said), parser.finish()]:
        if event:
            texts[event.segment.kind] += event.text
            calls.add(event.segment.function)
    right = texts["content"] == e.final
    if e.call:
        try:
            same = json.loads(texts["call"]) == json.loads(e.call.arguments)
        except ValueError:
            same = False
        right = right and same and e.call.name in calls
    return Verdict(right, valid, len(texts["reasoning"]))


class Report(NamedTuple):
    table: str
    wrong: list[tuple[Example, list[int]]]
    share: float  # right, over all


def report(proceed: Continue, count: int, seed: int = 0) -> Report:
    examples = [e for skill in SKILLS for e in evaluation(skill, count, seed)]
    answers = proceed([document(e).prompt for e in examples])
    verdicts = [judge(e, said) for e, said in zip(examples, answers, strict=True)]
    lines = ["| skill | held-out examples | right | valid |", "|---|---|---|---|"]

    def line(name: str, of: list[Verdict]) -> None:
        shares = [100 * sum(values) / max(len(of), 1) for values in ([v.right for v in of], [v.valid for v in of])]
        lines.append(f"| {name} | {len(of)} | {shares[0]:.1f} % | {shares[1]:.1f} % |")

    for skill in SKILLS:
        line(skill, [v for e, v in zip(examples, verdicts, strict=True) if e.skill == skill])
    line("all", verdicts)
    lengths = []
    for effort in ("low", "medium", "high"):
        of = [v.analysis for e, v in zip(examples, verdicts, strict=True) if e.effort == effort and not e.text[0]]
        lengths.append(f"{effort} {sum(of) / max(len(of), 1):.0f}")
    lines += ["", f"Characters of analysis by reasoning effort: {', '.join(lengths)}."]
    wrong = [(e, said) for e, said, v in zip(examples, answers, verdicts, strict=True) if not (v.right and v.valid)]
    return Report("\n".join(lines), wrong, sum(v.right for v in verdicts) / len(verdicts))


def mistakes(wrong: list[tuple[Example, list[int]]], each: int) -> str:
    """Some wrong answers of each skill, to read."""
    t, out = tokenizer(), []
    for skill in SKILLS:
        for e, said in [pair for pair in wrong if pair[0].skill == skill][:each]:
            asked = e.text[0] or " / ".join(turn.content or str(turn.calls) for turn in e.turns)
            out.append(
                f"[{skill}] {asked}\n  said:   {t.decode(said, skip_special=False)}\n"
                f"  wanted: {e.analysis} | {e.text[1] or e.call or e.final}"
            )
    return "\n".join(out)


def served(url: str, model: str, streams: int) -> Continue:
    def one(prompt: list[int]) -> list[int]:
        body = {
            "model": model,
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": ROW - len(prompt),
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)["choices"][0]["token_ids"]

    def proceed(prompts: list[list[int]]) -> list[list[int]]:
        with ThreadPoolExecutor(streams) as pool:
            return list(pool.map(one, prompts))

    return proceed


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--url", default="http://127.0.0.1:8000")
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--count", type=int, default=20, help="examples of each skill")
    arguments.add_argument("--streams", type=int, default=8)
    arguments.add_argument("--mistakes", type=int, default=0, help="wrong answers of each skill to print")
    given = arguments.parse_args()
    made = report(served(given.url, given.model, given.streams), given.count)
    print(made.table)
    print(mistakes(made.wrong, given.mistakes))


if __name__ == "__main__":
    main()
