"""Held-out exact match by skill: what a running server answers, or whatever else answers examples.

    python -m demo.training.evaluate --url http://127.0.0.1:8000 --count 20

A server is asked as clients ask: chats with tools, reasoning effort and instructions; plain text to continue. Only what
depends on the date goes as token ids, since a server dates its chats itself.
"""

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from openai_harmony import Role
from rich.console import Console
from rich.progress import track

from conf.limits import CALL, ENDOFTEXT, RETURN
from demo.training.data import ROW, document, evaluation, tokenizer
from demo.training.skills import EFFORTS, SKILLS, Example
from serve.harmony import Call, Parser, Turn, any_call_header


class Answer(NamedTuple):
    """What the assistant said in its turn."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    valid: bool = False  # it can be read, says or calls something, and ended by itself


Ask = Callable[[list[Example]], Iterable[Answer]]


def right(e: Example, answer: Answer) -> bool:
    """Whether content and calls are the wanted ones; arguments are compared as JSON, the reasoning is free."""
    wanted = [(e.call.name, json.loads(e.call.arguments))] if e.call else []
    try:
        called = [(call.name, json.loads(call.arguments)) for call in answer.calls]
    except ValueError:
        return False
    return called == wanted and answer.content == (e.text[1] or e.final)


def read(e: Example, said: list[int]) -> Answer:
    """The answer in the token ids that follow the prompt of `document(e)`, its stop token included."""
    t = tokenizer()
    if e.text[0]:
        return Answer(t.decode(said, skip_special=True), valid=said[-1:] == [ENDOFTEXT])
    begun = any_call_header(t) if e.call and not e.analysis else []
    try:
        t.encoding.parse_messages_from_completion_tokens([*begun, *said], Role.ASSISTANT)
        valid = said[-1:] in ([RETURN], [CALL])
    except Exception:  # the library raises several kinds
        valid = False
    parser, texts, calls = Parser(t, begun), {"content": "", "reasoning": ""}, {}
    for event in [*map(parser.feed, said), parser.finish()]:
        if event and event.segment.kind == "call":
            _, arguments = calls.get(id(event.segment), (None, ""))
            calls[id(event.segment)] = (event.segment, arguments + event.text)
        elif event and event.segment.kind in texts:
            texts[event.segment.kind] += event.text
    called = tuple(Call(segment.function, arguments) for segment, arguments in calls.values())
    return Answer(**texts, calls=called, valid=valid and bool(texts["content"] or called))


class Report(NamedTuple):
    table: str  # Markdown
    wrong: list[tuple[Example, Answer]]
    share: float  # right, over all


def report(ask: Ask, count: int, seed: int = 0) -> Report:
    """Asks `count` held-out examples of each skill."""
    examples = [e for skill in SKILLS for e in evaluation(skill, count, seed)]
    judged = [(e, answer, right(e, answer)) for e, answer in zip(examples, ask(examples), strict=True)]
    lines = ["| skill | held-out examples | right | valid |", "|---|---|---|---|"]
    for name in (*SKILLS, "all"):
        of = [(correct, answer.valid) for e, answer, correct in judged if name in (e.skill, "all")]
        shares = [f"{100 * sum(values) / len(of):.1f} %" for values in zip(*of, strict=True)]
        lines.append(f"| {name} | {len(of)} | {' | '.join(shares)} |")
    lengths = []
    for effort in EFFORTS:
        of = [len(answer.reasoning) for e, answer, _ in judged if e.effort == effort and not e.text[0]]
        lengths.append(f"{effort} {sum(of) / max(len(of), 1):.0f}")
    lines += ["", f"Characters of analysis by reasoning effort: {', '.join(lengths)}."]
    wrong = [(e, answer) for e, answer, correct in judged if not (correct and answer.valid)]
    return Report("\n".join(lines), wrong, sum(correct for _, _, correct in judged) / len(judged))


def mistakes(wrong: list[tuple[Example, Answer]], each: int) -> str:
    """Up to `each` wrong answers of each skill, to read."""
    out = []
    for skill in SKILLS:
        for e, answer in [pair for pair in wrong if pair[0].skill == skill][:each]:
            asked = e.text[0] or " / ".join(turn.content or str(turn.calls) for turn in e.turns)
            said = f"{answer.reasoning!r} {answer.calls or answer.content!r}{'' if answer.valid else ', invalid'}"
            out.append(
                f"[{skill}] {asked}\n  said:   {said}\n  wanted: {e.analysis!r} {e.call or e.text[1] or e.final!r}"
            )
    return "\n".join(out)


class ServerError(RuntimeError):
    """A server that does not answer as it should; the message names its URL, what it said and what to do."""


def served(url: str, model: str, streams: int) -> Ask:
    """Asks a server, `streams` examples at a time. Raises ServerError."""

    def post(route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the greedy answer."""
        data = json.dumps({"model": model, "temperature": 0, **body}).encode()
        request = urllib.request.Request(f"{url}/v1/{route}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply)["choices"][0]
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                text = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                text = text[:200]
            raise ServerError(f"{request.full_url}: status {error.code}: {text}") from error
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"{request.full_url}: {reason!r}; is a server running there? (make serve)") from error

    def one(e: Example) -> Answer:
        prompt = document(e).prompt
        body: dict[str, Any] = {"max_tokens": ROW - len(prompt)}
        if e.text[0]:
            choice = post("completions", body | {"prompt": e.text[0]})
            return Answer(choice["text"], valid=choice["finish_reason"] == "stop")
        if e.skill == "today":
            return read(e, post("completions", body | {"prompt": prompt, "return_token_ids": True})["token_ids"])
        choice = post("chat/completions", body | chat(e))
        said, content = choice["message"], choice["message"]["content"] or ""
        calls = [call["function"] for call in said.get("tool_calls", [])]
        called = tuple(Call(call["name"], call["arguments"]) for call in calls)
        ended = choice["finish_reason"] in ("stop", "tool_calls")
        return Answer(content, said["reasoning_content"] or "", called, ended and bool(content or calls))

    def ask(examples: list[Example]) -> Iterable[Answer]:
        console = Console(stderr=True)
        with ThreadPoolExecutor(streams) as pool:
            yield from track(
                pool.map(one, examples),
                "asking",
                len(examples),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )

    return ask


def chat(e: Example) -> dict[str, Any]:
    """The example as a request to /v1/chat/completions, its date apart."""
    body: dict[str, Any] = {"messages": messages(e.turns), "reasoning_effort": e.effort}
    if e.functions:
        body["tools"] = [{"type": "function", "function": function._asdict()} for function in e.functions]
    if e.call and not e.analysis:
        body["tool_choice"] = "required"
    return body


def messages(turns: list[Turn]) -> list[dict[str, Any]]:
    """A tool's answer is to the last call before it."""
    told: list[dict[str, Any]] = []
    call_id = ""
    for turn in turns:
        message = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        for call in turn.calls:
            call_id = f"call_{len(told)}"
            message["tool_calls"] = [{"id": call_id, "type": "function", "function": call._asdict()}]
        if turn.role == "tool":
            message["tool_call_id"] = call_id
        told.append(message)
    return told


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url", default="http://127.0.0.1:8000")
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--count", type=int, default=20, help="examples of each skill")
    arguments.add_argument("--streams", type=int, default=8, help="requests at a time")
    arguments.add_argument("--mistakes", type=int, default=0, help="wrong answers of each skill to print")
    given = arguments.parse_args()
    try:
        made = report(served(given.url.rstrip("/"), given.model, given.streams), given.count)
    except ServerError as error:
        raise SystemExit(str(error)) from error
    print(made.table)
    if given.mistakes:
        print("", mistakes(made.wrong, given.mistakes), sep="\n")


if __name__ == "__main__":
    main()
