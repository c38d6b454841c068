"""Lines on the console, by the main process."""

import sys

import torch
from tqdm import tqdm

from lpo_fast.system import distributed


def say(line: str) -> None:
    """A line above the progress bar, by the main process."""
    if distributed.is_main():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def memory() -> str:
    """Peak memory of the device (of the process on a CPU)."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
