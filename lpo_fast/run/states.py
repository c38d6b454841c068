"""The state that --resume goes on from: written whole, found whole, the one before in reserve."""

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
SUMS = 100  # lines of STATE_SUMS: each save that fails leaves one of a state that never was


class Trained:
    """The parameters of a module that train, as something with a state_dict."""

    def __init__(self, module: nn.Module):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """Their values."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put values back. Raises ValueError unless names and shapes are the same."""
        if {n: p.shape for n, p in self.parameters.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("other parameters train")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(sharding.part(state[name], parameter))


def saved_states(out: Path) -> list[Path]:
    """The states in a run directory that --resume may go on from, the newest first: the one before may be needed."""
    return [out / name for name in (STATE, STATE_BEFORE) if (out / name).is_file()]


def state_sums(out: Path) -> list[str]:
    """SHA-256 of the states that may lie in a run directory, the newest first; none of a run before there were any."""
    file = out / STATE_SUMS
    return file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []


def save_state(file: Path, at: dict, parts: dict[str, Any]) -> None:
    """All that a resumed run needs: where it stands, and the state_dict of each part (None: not in use).

    The state before becomes STATE_BEFORE. The main process writes; if the parts are sharded, all processes call it. Raises
    InputError if the disk refuses.
    """
    saved = {name: part and sharding.gathered(part.state_dict()) for name, part in parts.items()}
    if distributed.is_main():
        with replacing(file, file.with_name(STATE_BEFORE)) as aside:
            sums = [save_pickle({"at": at} | saved, aside), *state_sums(file.parent)]
            with replacing(file.with_name(STATE_SUMS)) as listed:  # first: if killed here, the two states that stay are in it
                listed.write_text("\n".join(sums[:SUMS]) + "\n", encoding="utf-8")


def load_state(file: Path, parts: dict[str, Any]) -> dict:
    """Restore what ``save_state`` wrote into the parts; where the run stands. All processes call it.

    The state before is taken, and takes the newest one's place, if that is damaged or missing. Raises InputError if no state
    is whole, or if it is of other parts.
    """
    source = whole_state(file)
    state = read_pickle(source, "--out", mmap=distributed.world_size() > 1)  # no copy of it in the memory of each
    try:
        for name, part in parts.items():
            if (part is None) != (state[name] is None):
                raise ValueError(f"{name} was {'not ' if part else ''}in use")
            if part is not None:
                sharding.load(part, state[name])
        at = state["at"]
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise InputError(str(source), f"was saved with other settings ({error})", "resume with the run's own settings",
                         "--out") from error
    if source != file:
        distributed.barrier()  # all have read it
        if distributed.is_main():  # else the next save would put the damaged one in the place of the whole one
            os.replace(source, file)
    return at


def whole_state(file: Path) -> Path:
    """The newest state that is as it was written."""
    sums, wrong = state_sums(file.parent), {}
    for state in saved_states(file.parent):
        what = damage(state)
        if sums and not what and sha256(state) not in sums:
            what = f"{state.name} has changed since it was written"
        if not what:
            if wrong:
                console.say(f"warning: {file}: {wrong[file]}; the run goes on from the state before it")
            return state
        wrong[state] = what
    raise InputError(str(file), "; ".join(wrong.values()) or "no state there", "start a new run in another directory, from a "
                     "checkpoint with --resume-from if there is one", "--out")
