"""Save and load the state that --resume continues from, with checksums and the previous state in reserve.

What goes in: session.Run.save, Progress.state, Learner.parts. Checkpoints are lpo/checkpoints.py and
lrm/selection.py.
"""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lpo_fast.errors import InputError
from lpo_fast.models import sharding
from lpo_fast.system import console, distributed
from lpo_fast.system.checksums import damage, sha256
from lpo_fast.system.reading import read_pickle
from lpo_fast.system.writing import replacing, save_pickle

STATE, STATE_BEFORE, STATE_SUMS = "state.pt", "state.before.pt", "state.sha256"
SUMS = 100  # most lines of STATE_SUMS: each failed save leaves the line of a state that was never completed


class Trained:
    """Give a module's trained parameters a state_dict of their own."""

    def __init__(self, module: nn.Module):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters' values by name."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy values into the parameters. Raises ValueError unless names and shapes are the same."""
        if {n: p.shape for n, p in self.parameters.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("other parameters are trained")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(sharding.part(state[name], parameter))


def saved_states(out: Path) -> list[Path]:
    """Return the states in a run directory that --resume may continue from, the newest first."""
    return [out / name for name in (STATE, STATE_BEFORE) if (out / name).is_file()]


def state_sums(out: Path) -> list[str]:
    """Return the SHA-256 of the states that may be in a run directory, the newest first.

    Empty for runs of versions that wrote no checksums.
    """
    file = out / STATE_SUMS
    return file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []


def save_state(file: Path, at: dict, parts: dict[str, Any]) -> None:
    """Write everything that a resumed run needs: its progress ``at``, and the state_dict of each part.

    A part that is None is not in use. The previous state becomes STATE_BEFORE. Only the main process writes;
    if the parts are sharded, all processes must call this. Raises InputError if the file cannot be written.
    """
    saved = {name: part and sharding.gathered(part.state_dict()) for name, part in parts.items()}
    if distributed.is_main():
        with replacing(file, file.with_name(STATE_BEFORE)) as aside:
            sums = [save_pickle({"at": at} | saved, aside), *state_sums(file.parent)]
            # Written before the state is replaced: if killed in between, both remaining states are listed.
            with replacing(file.with_name(STATE_SUMS)) as listed:
                listed.write_text("\n".join(sums[:SUMS]) + "\n", encoding="utf-8")


def load_state(file: Path, parts: dict[str, Any]) -> dict:
    """Load what ``save_state`` wrote into the parts; return the run's progress. All processes must call it.

    If the newest state is damaged or missing, the previous one is loaded and replaces it. Raises InputError
    if no state is intact, or if it was saved with other parts.
    """
    source = intact_state(file)
    state = read_pickle(source, "--out", mmap=distributed.world_size() > 1)  # not one copy per process
    try:
        for name, part in parts.items():
            if (part is None) != (state[name] is None):
                raise ValueError(f"{name} was {'not ' if part else ''}in use")
            if part is not None:
                sharding.load(part, state[name])
        at = state["at"]
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise InputError(str(source), f"was saved with other settings ({error})",
                         "resume with the settings the run was started with", "--out") from error
    if source != file:
        distributed.barrier()  # all processes have read it
        if distributed.is_main():  # otherwise the next save would replace the intact state by the damaged one
            os.replace(source, file)
    return at


def intact_state(file: Path) -> Path:
    """Return the newest state that is as it was written. Raises InputError if there is none."""
    sums, wrong = state_sums(file.parent), {}
    for state in saved_states(file.parent):
        what = damage(state)
        if sums and not what and sha256(state) not in sums:
            what = f"{state.name} has changed since it was written"
        if not what:
            if wrong:
                console.say(f"warning: {file}: {wrong[file]}; the run continues from the state before it")
            return state
        wrong[state] = what
    raise InputError(str(file), "; ".join(wrong.values()) or "there is no state",
                     "start a new run in another directory, from a checkpoint with --resume-from if there is "
                     "one", "--out")
