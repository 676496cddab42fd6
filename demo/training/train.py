"""Trains the demo model for a given time and writes its bundle; the learning rate follows the clock.

    python -m demo.training.train --minutes 8 --out build/demo

Matrices of the layers are updated by Muon (Jordan et al. 2024, in the scaling of arXiv 2502.16982), the rest by AdamW.
The learning rate rises over the first 3 % of the time and falls linearly to zero. In the last part the experts are
rounded to MXFP4 in the forward, and so are the weights that are kept.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from conf.limits import VOCABULARY
from demo import bundle
from demo.checkpoint import DEMO
from demo.training.data import ROW, STOPS, document, index_of, rows, training, vocabulary
from demo.training.evaluate import Answer, Ask, mistakes, read, report
from demo.training.model import computed, generate, initial, loss
from demo.training.packing import Weights, unpack, write
from demo.training.skills import Example
from engine.architecture import Architecture
from engine.model import rope_tables

WARM_UP = 0.03  # of the time


class Rows(IterableDataset[Any]):
    """Endless packed rows, different in every worker.

    A worker builds the index itself: pickled it is larger than a pipe's buffer, and the workers would start one by one.
    """

    def __init__(self, tokens: list[int], seed: int) -> None:
        self.tokens, self.seed = tokens, seed

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return rows(training(self.seed * 1000 + (worker.id if worker else 0)), index_of(self.tokens))


class Muon:
    """Momentum, orthogonalised by Newton-Schulz. Matrices of one shape are stacked and updated together."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, decay: float = 0.05) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.velocity = {shape: torch.zeros_like(torch.stack(group)) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient, velocity = torch.stack([p.grad for p in group if p.grad is not None]), self.velocity[shape]
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(velocity, self.momentum)) * (0.2 * math.sqrt(max(shape[-2:])) * rate)
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_sub_(group, list(update.unbind(0)))


def orthogonal(matrices: Tensor) -> Tensor:
    """[..., rows, columns] -> roughly the nearest semi-orthogonal matrices, by five steps of a quintic iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    out: Tensor = x.mT if tall else x
    return out.float()


def is_matrix(name: str) -> bool:
    """Whether Muon updates it: the layers' matrices but the router's."""
    return name.startswith("model.layers.") and name.endswith(("proj.weight", "gate_up_proj", "down_proj"))


def answering(w: Weights, a: Architecture, tokens: list[int], device: torch.device) -> Ask:
    """Greedy answers of the weights as they will be shipped."""
    index = index_of(tokens)
    known = [*tokens, VOCABULARY - 1]
    cos, sin = rope_tables(a, ROW, device)

    def ask(examples: list[Example]) -> list[Answer]:
        prompts = [index[document(e).prompt].tolist() for e in examples]
        answers = generate(w, a, prompts, index[list(STOPS)].tolist(), ROW, cos, sin)
        return [read(e, [known[token] for token in answer]) for e, answer in zip(examples, answers, strict=True)]

    return ask


def train(a: Architecture, given: argparse.Namespace) -> None:
    """Train with the arguments of `parser`; writes bundle, hash, evaluation and the arguments into `given.out`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    if given.start:
        earlier = Path(given.start)
        weights, tokens = unpack(bundle.read(earlier, bundle.digest_of(earlier)))
    else:
        weights, tokens = {}, vocabulary(given.vocabulary_sample)
    loader = iter(
        DataLoader(
            Rows(tokens, given.seed),
            batch_size=given.rows,
            num_workers=given.workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if given.workers else None,
            multiprocessing_context="spawn" if given.workers else None,
        )
    )
    weights = weights or initial(a, len(tokens) + 1, given.seed, device)
    weights = {name: p.to(device).requires_grad_() for name, p in weights.items()}
    muon = Muon([p for name, p in weights.items() if is_matrix(name)])
    others = [p for name, p in weights.items() if not is_matrix(name)]
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    cos, sin = rope_tables(a, ROW, device)
    loss_of = torch.compile(loss) if given.compile else loss

    def losses() -> tuple[Tensor, Tensor]:
        batch = [part.to(device, non_blocking=True) for part in next(loader)]
        ready = computed(weights, dtype, share >= given.quantise_from)
        cross, uneven = loss_of(ready, a, batch[0].long(), batch[1], batch[2], cos, sin)
        (cross + given.balance * uneven).backward()
        return cross.detach(), uneven.detach()

    share, step = 0.0, 0
    losses()  # the first call compiles
    print(
        f"{len(tokens)} tokens, {sum(p.numel() for p in weights.values()) / 1e6:.1f} M parameters, "
        f"first pass after {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    start, reported = time.monotonic(), 0.0
    available = begin + 60 * given.minutes - start
    if available <= 0:
        raise SystemExit(
            f"--minutes {given.minutes:g}: all spent before the first step, {start - begin:.0f} s after the start"
        )
    while share < 1:
        for p in weights.values():
            p.grad = None
        share = min((time.monotonic() - start) / available, 1.0)
        cross, uneven = losses()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        rate = min(share / WARM_UP, (1 - share) / (1 - WARM_UP))
        muon.step(rate * given.rate)
        adam.param_groups[0]["lr"] = rate * given.adam_rate
        adam.step()
        step += 1
        if step % 50 == 0 or share == 1:
            print(
                f"{100 * share:5.1f} %  step {step}  loss {cross.item():.4f}  uneven {uneven.item():.2f}  "
                f"{step * given.rows * ROW / (time.monotonic() - start) / 1e3:.0f} k tokens/s",
                flush=True,
            )
        if share >= reported + 0.2 and share < 0.95:
            reported = share
            write(out / "model.safetensors", weights, tokens)
            ready = computed(weights, dtype, True)
            print(report(answering(ready, a, tokens, device), max(1, given.count // 4)).table, flush=True)
    write(out / "model.safetensors", weights, tokens)
    result = report(answering(computed(weights, dtype, True), a, tokens, device), given.count)
    print(result.table)
    (out / "evaluation.md").write_text(result.table + "\n")
    (out / "mistakes.txt").write_text(mistakes(result.wrong, 20) + "\n")
    (out / "training.json").write_text(
        json.dumps(
            vars(given)
            | {
                "steps": step,
                "loss": cross.item(),
                "right": result.share,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            },
            indent=2,
        )
        + "\n"
    )


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", required=True, help="folder for the bundle, its hash and the evaluation")
    arguments.add_argument("--minutes", type=float, default=8, help="until the last step, preparations counted in")
    arguments.add_argument("--start", help="a bundle to train on from")
    arguments.add_argument("--rows", type=int, default=64, help=f"of {ROW} tokens in a step")
    arguments.add_argument("--rate", type=float, default=2e-3, help="Muon's highest learning rate")
    arguments.add_argument("--adam-rate", type=float, default=3e-3, help="AdamW's")
    arguments.add_argument("--balance", type=float, default=0.01, help="weight of the experts' unevenness in the loss")
    arguments.add_argument("--quantise-from", type=float, default=0.6, help="share of the time")
    arguments.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="that make examples")
    arguments.add_argument("--count", type=int, default=100, help="examples of each skill in the evaluation")
    arguments.add_argument(
        "--vocabulary-sample", type=int, default=60000, help="conversations that the vocabulary is taken from"
    )
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    return arguments


if __name__ == "__main__":
    train(DEMO, parser().parse_args())
