"""Models, data and settings that pass the checks before a run, for tests that break one of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.models import loras
from lpo_fast.system import writing
from tests.helpers.pairs import table


@dataclass
class Bench:
    """Where the settings of a case may point to."""

    tmp: Path
    sd: Path
    lrm: Path
    copy: Callable[[Path], Path]

    def file(self, name: str, content: str | bytes = "") -> str:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def without(self, folder: Path, part: str) -> str:
        """A copy of a directory without a file or a part."""
        copy = self.copy(folder)
        writing._remove(copy / part)
        return str(copy)

    def with_config(self, folder: Path, part: str, **changes) -> str:
        """A copy of a directory with a changed config.json."""
        copy = self.copy(folder)
        file = copy / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(copy)

    def with_heads(self, **heads) -> str:
        """A copy of the LRM with other heads."""
        copy = self.copy(self.lrm)
        torch.save(torch.load(copy / "state_dict.pt", weights_only=True) | heads, copy / "state_dict.pt")
        return str(copy)

    def broken(self, folder: Path, file: str, content: str = "{") -> str:
        copy = self.copy(folder)
        (copy / file).write_text(content)
        return str(copy)

    def pairs(self, name: str = "other.parquet", **changed) -> str:
        return str(table(self.tmp / name, ["a", "b"], **changed))

    def captions_alone(self) -> str:
        pq.write_table(pa.table({"caption": ["a"]}), self.tmp / "captions.parquet")
        return str(self.tmp / "captions.parquet")

    def lora(self, rank: int) -> str:
        from diffusers import UNet2DConditionModel
        unet = UNet2DConditionModel.from_pretrained(self.sd, subfolder="unet")
        loras.add_lora(unet, rank, rank, ("to_q", "to_k", "to_v", "to_out.0"), 0)
        loras.save_lora(unet, self.tmp / "lora")
        return str(self.tmp / "lora")


def clip(bench: Bench, width: int) -> str:
    torch.save({"text_projection.weight": torch.zeros(8, width)}, bench.tmp / "clip.bin")
    return str(bench.tmp / "clip.bin")


def refused(train: Callable, settings: LPO | LRM, flag: str, message: str) -> InputError:
    """The training function refuses the settings, and the run directory does not come to exist."""
    with pytest.raises(InputError) as caught:
        train(settings)
    problem = caught.value
    assert problem.key == flag and message in problem.problem and problem.remedy and problem.value
    assert str(problem).startswith(f"{flag} {problem.value}: ")
    assert not Path(settings.out).is_dir() and not (Path(settings.out).parent / "runs").exists()
    return problem
