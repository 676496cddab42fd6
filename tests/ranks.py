"""Several ranks in processes of their own, for tests and benches: on the CPU, on a GPU each, or sharing GPUs."""

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
from graphs.capture import prepare_cpu_process

SECONDS = 500  # until a rank counts as stuck


def together(function: Callable, size: int, *arguments: Any, gpus: int) -> list[Any]:
    """function(ranks, device, *arguments) in `size` processes -> what each returned, by rank.

    The ranks take turns among the first `gpus` GPUs; 0: they compute on the CPU. Raises AssertionError where one of
    them raises, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        shared = (function, size, Path(folder), gpus, results, *arguments)
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


def _rank(rank: int, function: Callable, size: int, folder: Path, gpus: int, results: Any, *arguments: Any) -> None:
    try:
        if 0 < gpus < size:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        if gpus:
            device = torch.device("cuda", rank % gpus)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            prepare_cpu_process()
        with torch.inference_mode():
            value = function(Ranks(rank, size, folder), device, *arguments)
        if gpus:
            torch.cuda.synchronize()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
