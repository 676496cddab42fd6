"""Several ranks in processes of their own, for tests and benches: each on its GPU, or all sharing the first."""

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.parallel import Ranks

SECONDS = 500  # until a rank counts as stuck


def together(function: Callable, size: int, *arguments: Any, share_gpu: bool = False) -> list[Any]:
    """function(ranks, device, *arguments) in `size` processes -> what each returned, by rank. Raises if one does."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        shared = (function, size, Path(folder), share_gpu, results, *arguments)
        processes = [context.Process(target=_rank, args=(rank, *shared), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        try:
            returned = {}
            for _ in processes:
                rank, value, error = results.get(timeout=SECONDS)
                if error:
                    raise AssertionError(f"rank {rank}: {error}")
                returned[rank] = value
        except queue.Empty:
            raise AssertionError(f"only ranks {sorted(returned)} ended within {SECONDS} s") from None
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return [returned[rank] for rank in range(size)]


def _rank(rank: int, function: Callable, size: int, folder: Path, share_gpu: bool, results: Any, *arguments) -> None:
    try:
        if share_gpu:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        device = torch.device("cuda", 0 if share_gpu else rank)
        torch.cuda.set_device(device)
        with torch.inference_mode():
            value = function(Ranks(rank, size, folder), device, *arguments)
        torch.cuda.synchronize()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
