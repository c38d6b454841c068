"""Print lines on the console, from rank 0 only."""

import sys

import torch
from tqdm import tqdm

from lpo_fast.system import distributed


def say(line: str) -> None:
    """Print a line above the progress bar, on rank 0."""
    if distributed.is_main():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def memory() -> str:
    """Return the peak memory of the device (of the process on a CPU), as text in GB."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
