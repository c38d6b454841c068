"""Run a loop that can be stopped and resumed: its progress, saved states and metrics. Both loops use it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.run import clock, logs, states
from lpo_fast.run.monitor import CollapseMonitor, SkippedSteps
from lpo_fast.system import console, distributed


@dataclass
class Progress:
    """Hold a run's progress; the fields are saved. step: optimizer steps taken."""

    step: int = 0

    @property
    def done(self) -> int:
        """Return how many units of the loop's progress bar are done."""
        return self.step

    def state(self) -> dict[str, Any]:
        """Return the fields as plain values and CPU tensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the fields from what ``state`` returned; an earlier version may have saved fewer."""
        for field in fields(self):
            setattr(self, field.name, saved.get(field.name, getattr(self, field.name)))


class Run:
    """Hold an open run directory, whose loop can be stopped and resumed at any optimizer step."""

    def __init__(self, config: LPO | LRM, at: Progress, parts: dict[str, Any], columns: tuple[str, ...], *,
                 skips: SkippedSteps, watch: CollapseMonitor | None = None, appends: bool = False,
                 exit_code: int = 0, after_save: Callable[[], None] | None = None):
        """Open the directory, for a new run or to resume the one in it.

        parts: objects with a state_dict, which are saved. columns: names of an optimizer step's metrics, the
        loss first. appends: keep the metrics already in the directory. exit_code: of a stopped run; 0: 128 +
        the signal's number.
        """
        self.config, self.at, self.parts, self.columns = config, at, parts, columns
        self.skips, self.watch, self.exit_code, self.after_save = skips, watch, exit_code, after_save
        self.out = Path(config.out)
        # False without --resume, and if the run was killed before it saved a state.
        self.resumed = config.resume and bool(states.saved_states(self.out))
        self.log = logs.RunLog(config, self.resumed or appends)
        self.queued: list[tuple[int, Tensor, Any, dict[str, Any]]] = []
        self.caught: list[int] = []
        self.problem: InputError | None = None
        self.saved: tuple[int, int] | None = None  # step and done of the saved state
        if config.resume and not self.resumed:
            console.say(f"warning: {self.out} holds no saved state: the run starts from the beginning")

    def restore(self, digest: str, path: str, flag: str) -> None:
        """Load the saved state into all parts.

        digest: name of the Progress field that holds the data's digest. Raises InputError, which names
        ``path`` and ``flag``, if the data changed since the run began.
        """
        known = getattr(self.at, digest)
        saved = states.load_state(self.out / states.STATE, self.parts)
        self.log.truncate(saved["metrics"])
        self.skips.state = saved["skips"]
        if self.watch:
            self.watch.state = saved["watch"]
        self.at.load(saved)
        self.saved = self.at.step, self.at.done
        logs.require_same(getattr(self.at, digest), known, path, flag)

    def save(self) -> None:
        """Save the state that --resume starts from."""
        watched = {"watch": self.watch.state} if self.watch else {}
        here = {"metrics": self.log.size, "skips": self.skips.state} | watched
        states.save_state(self.out / states.STATE, self.at.state() | here, self.parts)
        self.saved = self.at.step, self.at.done
        if self.after_save:
            self.after_save()

    def queue(self, values: Tensor, fed: Any, **more: Any) -> None:
        """Record an optimizer step whose metrics, values [len(columns)], stay on the device until ``flush``.

        fed: the step's inputs, kept if its loss is not finite. more: further metrics.
        """
        self.queued.append((self.at.step, values, fed, more))
        self.at.step += 1

    def flush(self, keep: int = 0, check: bool = True) -> list[dict[str, Any]]:
        """Read, log, and return the metrics of all queued steps but the last ``keep``.

        One read from the device. check: call ``check`` at the end.
        """
        steps = self.queued[:len(self.queued) - keep]
        self.queued = self.queued[len(steps):]
        read = torch.stack([values for _, values, *_ in steps]).tolist() if steps else []
        rows = []
        for (step, _, fed, more), values in zip(steps, read, strict=True):
            row = dict(zip(self.columns, values, strict=True)) | more
            self.log.log("train", step, **row)
            found = self.skips.look(step, self.at.step, row[self.columns[0]], row["grad_norm"], fed)
            self.problem = self.problem or found
            rows.append(row)
        if check:
            self.check()
        return rows

    def check(self) -> None:
        """Raise InputError, with the state saved, if a flushed step was one skipped step too many in a row.
        """
        if self.problem:
            self.save()
            raise self.problem

    @property
    def stopping(self) -> bool:
        """Return whether a signal asked any process to stop. All processes ask together."""
        return distributed.any_rank(self.caught)

    @contextmanager
    def going(self, name: str, unit: str, total: int) -> Iterator[tqdm]:
        """Run the loop inside: SIGINT and SIGTERM only set ``stopping``, and the state is saved when it ends.

        Yields the progress bar over ``total`` units. A loop that ended before ``total`` raises SystemExit.
        """
        hidden = None if distributed.is_main() else True  # None: shown on terminals only
        bar = tqdm(total=total, initial=self.at.done, desc=name, unit=unit, leave=False, disable=hidden)
        with clock.stoppable() as self.caught:
            yield bar
            self.flush()
            if self.saved != (self.at.step, self.at.done):
                self.save()
        bar.close()
        if self.at.done < total:
            self.close()
            console.say(f"stopped after step {self.at.step}; continue with --resume")
            raise SystemExit(self.exit_code or 128 + (self.caught or [signal.SIGTERM])[0])

    def close(self) -> None:
        """Close the files and trackers, and wait for all processes.

        A launcher ends all of them soon after the first one exits.
        """
        self.log.close()
        distributed.barrier()
