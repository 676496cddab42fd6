"""Exact match on held-out examples, by skill: of a running server, or of anything else that answers examples.

    python -m demo.training.evaluate --url http://127.0.0.1:8000 --count 20

A server gets the requests that clients send: chats with tools, reasoning effort and instructions; plain text to
continue. Only examples that depend on the date are sent as token ids, since a server dates its chats itself.
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
    """The assistant's message."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    valid: bool = False  # it parses, has content or a call, and ended by itself


Ask = Callable[[list[Example]], Iterable[Answer]]


def right(e: Example, answer: Answer) -> bool:
    """Whether content and calls are the expected ones. Arguments are compared as JSON; reasoning is not compared."""
    expected = [(e.call.name, json.loads(e.call.arguments))] if e.call else []
    try:
        called = [(call.name, json.loads(call.arguments)) for call in answer.calls]
    except ValueError:
        return False
    return called == expected and answer.content == (e.text[1] or e.final)


def read(e: Example, tokens: list[int]) -> Answer:
    """The answer in the token ids that follow the prompt of `document(e)`, its stop token included."""
    t = tokenizer()
    if e.text[0]:
        return Answer(t.decode(tokens, skip_special=True), valid=tokens[-1:] == [ENDOFTEXT])
    prefilled = any_call_header(t) if e.call and not e.analysis else []
    try:
        t.encoding.parse_messages_from_completion_tokens([*prefilled, *tokens], Role.ASSISTANT)
        valid = tokens[-1:] in ([RETURN], [CALL])
    except Exception:  # the library raises several kinds
        valid = False
    parser, texts = Parser(t, prefilled, [f.name for f in e.functions]), {"content": "", "reasoning": ""}
    calls: dict[int, Any] = {}
    for event in [*map(parser.feed, tokens), parser.finish()]:
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
    results = [(e, answer, right(e, answer)) for e, answer in zip(examples, ask(examples), strict=True)]
    lines = ["| skill | held-out examples | right | valid |", "|---|---|---|---|"]
    for name in (*SKILLS, "all"):
        flags = [(correct, answer.valid) for e, answer, correct in results if name in (e.skill, "all")]
        shares = [f"{100 * sum(values) / len(flags):.1f} %" for values in zip(*flags, strict=True)]
        lines.append(f"| {name} | {len(flags)} | {' | '.join(shares)} |")
    lengths = []
    for effort in EFFORTS:
        sizes = [len(answer.reasoning) for e, answer, _ in results if e.effort == effort and not e.text[0]]
        lengths.append(f"{effort} {sum(sizes) / max(len(sizes), 1):.0f}")
    lines += ["", f"Characters of analysis by reasoning effort: {', '.join(lengths)}."]
    wrong = [(e, answer) for e, answer, correct in results if not (correct and answer.valid)]
    return Report("\n".join(lines), wrong, sum(correct for _, _, correct in results) / len(results))


def mistakes(wrong: list[tuple[Example, Answer]], each: int) -> str:
    """Up to `each` wrong answers of each skill, to read."""
    out = []
    for skill in SKILLS:
        for e, answer in [pair for pair in wrong if pair[0].skill == skill][:each]:
            question = e.text[0] or " / ".join(turn.content or str(turn.calls) for turn in e.turns)
            actual = f"{answer.reasoning!r} {answer.calls or answer.content!r}{'' if answer.valid else ', invalid'}"
            out.append(
                f"[{skill}] {question}\n  actual:   {actual}\n"
                f"  expected: {e.analysis!r} {e.call or e.text[1] or e.final!r}"
            )
    return "\n".join(out)


class ServerError(RuntimeError):
    """A server that cannot be evaluated; the message names its URL, the error and what to do."""


def served(url: str, model: str, streams: int) -> Ask:
    """Asks a server, `streams` examples at a time. Raises ServerError."""

    def post(route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the greedy answer."""
        data = json.dumps({"model": model, "temperature": 0, **body}).encode()
        request = urllib.request.Request(f"{url}/v1/{route}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                choice: dict[str, Any] = json.load(reply)["choices"][0]
                return choice
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
        message, content = choice["message"], choice["message"]["content"] or ""
        calls = [call["function"] for call in message.get("tool_calls", [])]
        called = tuple(Call(call["name"], call["arguments"]) for call in calls)
        ended = choice["finish_reason"] in ("stop", "tool_calls")
        return Answer(content, message["reasoning_content"] or "", called, ended and bool(content or calls))

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
    """The example as a request to /v1/chat/completions, without its date."""
    body: dict[str, Any] = {"messages": messages(e.turns), "reasoning_effort": e.effort}
    if e.functions:
        body["tools"] = [{"type": "function", "function": function._asdict()} for function in e.functions]
    if e.call and not e.analysis:
        body["tool_choice"] = "required"
    return body


def messages(turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns as messages of the API. A tool's answer belongs to the last call before it."""
    chat_messages: list[dict[str, Any]] = []
    call_id = ""
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        for call in turn.calls:
            call_id = f"call_{len(chat_messages)}"
            message["tool_calls"] = [{"id": call_id, "type": "function", "function": call._asdict()}]
        if turn.role == "tool":
            message["tool_call_id"] = call_id
        chat_messages.append(message)
    return chat_messages


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url", default="http://127.0.0.1:8000")
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--count", type=int, default=20, help="examples of each skill")
    arguments.add_argument("--streams", type=int, default=8, help="requests at a time")
    arguments.add_argument("--mistakes", type=int, default=0, help="wrong answers of each skill to print")
    given = arguments.parse_args()
    try:
        result = report(served(given.url.rstrip("/"), given.model, given.streams), given.count)
    except ServerError as error:
        raise SystemExit(str(error)) from error
    print(result.table)
    if given.mistakes:
        print("", mistakes(result.wrong, given.mistakes), sep="\n")


if __name__ == "__main__":
    main()
