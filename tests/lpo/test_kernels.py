"""Both loops with every kernel, under Triton's interpreter or on the GPU,
equal the loops with the references."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpo_fast import config, train_lpo, train_lrm
from lpo_fast.lrm import checkpoint, selection
from lpo_fast.models import texts
from lpo_fast.shapes import evaluate, world
from lpo_fast.system import launch
from tests.helpers.runs import rows

STEPS = 3


# of ratios, which are about 1; how much depends on the CPU's products
ROUNDING = 40 * torch.finfo(torch.float32).eps


class Operators(TorchDispatchMode):
    """Names of our operators that were called."""

    def __init__(self):
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lpo_fast":
            self.called.add(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    evaluate.write_pairs(tmp_path / "pairs.parquet", 40, 0, held_out=False)
    return tmp_path / "pairs.parquet"


def both(monkeypatch: pytest.MonkeyPatch, train, settings) -> tuple[Path, Path, set[str]]:
    """Run directories with the references and with the kernels, and the operators of the second run."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "triton", None)
        with Operators() as operators:
            references = train(replace(settings, out=settings.out + "_references"))
        assert not operators.called
    with Operators() as operators:
        kernels = train(settings)
    return references, kernels, operators.called


def distance(first: dict[str, Tensor], second: dict[str, Tensor], names: Iterable[str]) -> float:
    """Euclidean distance of the named weights."""
    return sum((first[name] - second[name]).double().square().sum().item() for name in names) ** 0.5


def assert_rows_close(first: Path, second: Path, kind: str) -> None:
    """Equal metrics but for rounding, which beta = 500 and AdamW's division by small numbers enlarge."""
    first, second = ([{k: v for k, v in row.items() if k != "kind"} for row in rows(run, kind)]
                     for run in (first, second))
    assert len(first) == len(second) >= STEPS
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=ROUNDING)


def test_lrm_loop(kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, small: Path) -> None:
    settings = replace(config.shapes().lrm, model=str(small), pairs=str(pairs), validation_pairs="",
                       num_workers=0, out=str(tmp_path / "lrm"), batch_size=2, max_steps=STEPS,
                       warmup_steps=0, learning_rate=1e-4, guidance_scale=(1.0, 7.5), fused_norms=True)
    references, ours, called = both(monkeypatch, train_lrm.train, settings)
    assert called == {"reward_pool", "reward_pool_backward", "group_norm_silu", "group_norm_silu_backward"}
    assert_rows_close(references, ours, "train")
    first, second = (checkpoint.load_lrm(run / selection.FINAL).state_dict() for run in (references, ours))
    start = checkpoint.new_lrm(small, generator=torch.Generator().manual_seed(settings.seed)).state_dict()
    assert distance(second, first, start) < 2e-3 * distance(first, start, start)


def test_lpo_loop(kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path) -> None:
    lrm = checkpoint.new_lrm(small, generator=torch.Generator().manual_seed(0))
    checkpoint.save_lrm(lrm, texts.load_tokenizers(small, lrm.family), tmp_path / "lrm")
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:4]))
    settings = replace(config.shapes().lpo, model=str(small), lrm=str(tmp_path / "lrm"), pictures=0,
                       max_batches=0, prompts=str(tmp_path / "prompts.json"), out=str(tmp_path / "run"),
                       batch_size=2, num_steps=2, num_candidates=3, train_batch_size=2, threshold_min=0.0,
                       threshold_max=0.001, mixed_precision="no", learning_rate=1e-4, fused_norms=True)
    references, ours, called = both(monkeypatch, train_lpo.train, settings)
    assert called == {"reward_pool", "pair_loss", "pair_loss_backward", "ddim_candidates", "pair_select",
                      "group_norm_silu", "group_norm_silu_backward"}
    assert_rows_close(references, ours, "train")
    first, second = (load_file(run / "pytorch_lora_weights.safetensors") for run in (references, ours))
    start = {name: 0 * weight for name, weight in first.items() if "lora_B" in name or "lora.up" in name}
    assert start and distance(second, first, start) < 1e-3 * distance(first, start, start)
