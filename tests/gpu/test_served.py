"""`python serve.py` on GPUs, over HTTP: any number of ranks serves one model, and all of them end together."""

import threading
import time
from contextlib import suppress

import httpx
import pytest
import torch

from tests.served import Served

pytestmark = pytest.mark.gpu

ARGUMENTS = (
    "model=gpt-oss-20b",
    "model.weights=random",
    "model.random_shape.num_hidden_layers=4",
    "buckets.decode_rows=[1,8]",
    "buckets.prefill_tokens=[256]",
    "buckets.max_context=8192",
    "buckets.page_memory=0.3",
)
MODEL = {"model": "gpt-oss-20b", "ignore_eos": True}


@pytest.mark.parametrize(
    "tp",
    [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host"))],
)
def test_ranks_serve_one_model_and_end_together(tp):
    best = []
    for ranks in {1, tp}:
        with Served(*ARGUMENTS, f"+tp={ranks}").wait_ready() as server:
            for prompt in ([5, 6, 7], list(range(200)), list(range(1000, 1400))):
                choice = server.complete(prompt=prompt, logprobs=1, **MODEL).json()["choices"][0]
                assert len(choice["token_ids"]) == 8
                best.append((ranks, choice["logprobs"]["token_logprobs"][0]))
            if ranks < tp:
                continue

            def answer(server=server):
                with suppress(httpx.HTTPError):  # the connection breaks
                    server.complete(max_tokens=8000, **MODEL)

            thread = threading.Thread(target=answer)
            thread.start()
            deadline = time.monotonic() + 30
            while 'num_requests_running{model_name="gpt-oss-20b"} 1' not in httpx.get(f"{server.url}/metrics").text:
                assert time.monotonic() < deadline
            processes = server.ranks()
            assert len(processes) == tp
            processes[-1].kill()  # the others' kernels wait for it now
            assert server.process.wait(timeout=20) == 1
            assert not any(process.is_running() for process in processes)
            thread.join()
    for (_, one), (_, other) in zip(best[:3], best[-3:], strict=True):
        assert abs(one - other) < 0.3  # the ranks' sums are in another order
