"""Work by torch's counter and by hand, the page of a profile, and a run that is profiled."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lpo_fast import train_lpo
from lpo_fast.config import LPO
from lpo_fast.lpo import judging, policies, steps
from lpo_fast.lpo.sampling import LatentPairs
from lpo_fast.models import families, loras
from lpo_fast.preflight import meta
from lpo_fast.run import accounting, profiling
from lpo_fast.shapes import world
from tests.helpers.models import DEVICE

PROMPTS = world.captions(held_out=False)[:3]


@pytest.fixture
def lpo(tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> LPO:
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return LPO(model=str(tiny_sd), lrm=str(tiny_lrm), prompts=str(tmp_path / "prompts.json"),
               out=str(tmp_path / "run"), num_steps=3, num_candidates=2, batch_size=1, train_batch_size=2,
               pictures=0, epochs=1, threshold_shape="none", threshold_min=0.0)


def test_operations_by_hand() -> None:
    """A product [2, 3]·[3, 5] has 2·2·3·5; its gradient to the weight as many, none to the input,
    which asks for none."""
    layer, x = nn.Linear(3, 5, bias=False), torch.ones(2, 3)
    assert accounting.operations(lambda: layer(x)) == 60
    assert accounting.operations(lambda: layer(x).sum(), list(layer.parameters())) == 120
    assert layer.weight.grad is None


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_work_is_the_dry_runs(lpo: LPO, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which counts the same on tensors without contents;
    recomputation is no work, and the run's settings come back."""
    config = replace(lpo, checkpointing=checkpointing, steps_used="1:")
    actor, sched = policies.load(config, PROMPTS, DEVICE)
    judge = judging.load_score(config, PROMPTS, DEVICE)
    processors = actor.unet.attn_processors

    def plain(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v
    # torch has no formula for a CPU's own
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
    work = steps.work(actor, judge, sched, policies.latent_shape(config, actor.unet), config)
    assert (actor.unet.is_gradient_checkpointing == (checkpointing != "none")
            and actor.unet.attn_processors == processors)
    assert all(p.grad is None for p in actor.unet.parameters())
    monkeypatch.undo()
    config, shape = replace(config, checkpointing="none"), policies.latent_shape(config, actor.unet)
    x, t = meta.empty(1, *shape), meta.empty(1, dtype=torch.int64)
    words, _ = meta.encoded(judge.lrm.family, [families.without_weights(kind, Path(config.model) / name)
                                               for name, kind in judge.lrm.family.encoders], 3)
    monkeypatch.setattr(meta, "fused_attention", plain)  # whose backward pass computes a product twice
    actor, critic = meta.policy(config, "no", words), judging.Judge(meta.scorer(config), words, "no")
    pairs = LatentPairs(x, x, x, t, t, t > 0)
    with meta.on_cuda():
        step, scored = (meta.measure(part).flops
                        for part in (lambda: actor.predict(x, t, t), lambda: critic(x, t, t)))
        trained = meta.training_pass(lambda: steps.evaluate(
            actor, sched.to(meta.META), pairs, meta.empty(1), guidance=5.0, beta=500.0, eps=0.1).loss,
            loras.trainable(actor.unet)).flops
    assert work == {"prompts": 3 * step + 2 * 2 * scored, "pairs": trained}


def test_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a run does not wait for it; on a GPU 3 prompts of 4 TFLOP and 2 pairs of 5
    in 2 s are 11 TFLOP/s."""
    def never() -> dict[str, int]:
        raise AssertionError
    assert accounting.Meter(torch.device("cpu"), torch.float32, never).row(1.0, prompts=3) == {}
    assert accounting.text({}) == ""
    monkeypatch.setattr(accounting, "matrix_rate", lambda *_: 44e12)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    meter = accounting.Meter(torch.device("cuda"), torch.float16,
                             lambda: {"prompts": 4 * 10**12, "pairs": 5 * 10**12})
    row = meter.row(2.0, prompts=3, pairs=2)
    assert row == {"tflops": 11.0, "share_of_matrix_rate": 0.25}
    assert accounting.text(row) == " | 11 TFLOP/s (25%)"


def test_matrix_rate() -> None:
    """Between a slow phone and the fastest CPU."""
    assert 1e8 < accounting.matrix_rate(torch.device("cpu"), torch.float32) < 1e14


def test_page_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels that overlap, a gap of 20 µs, a third."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    spans = [("matrix", 0.0, 100.0), ("copy", 50.0, 130.0), ("matrix", 150.0, 250.0)]
    assert profiling.union(spans) == (230.0, [20.0])
    text = profiling.page("prompt batch", 0.001, spans, [])
    assert "1.0 ms, profiler included, on a GPU" in text and "- 3 launches" in text
    assert "busy 0.2 ms; idle 0.0 ms" in text and "waits" in text
    assert ": 1; the longest gap 0.02 ms, the median of all gaps 20.0 µs" in text
    assert ([line for line in text.splitlines() if line.endswith("`matrix` |")]
            == ["| 0.20 | 71.4% | 2 | `matrix` |"])


def test_a_profiled_run(lpo: LPO, tmp_path: Path) -> None:
    """Its third prompt batch alone; the run's results are those of another."""
    train_lpo.train(lpo)
    plain = (Path(lpo.out) / "metrics.jsonl").read_bytes()
    other = tmp_path / "profiled"
    train_lpo.train(replace(lpo, profile=True, out=str(other)))
    folder = other / "profile"
    assert (other / "metrics.jsonl").read_bytes() == plain
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::convolution" for event in trace["traceEvents"]) > 10
    text = (folder / "table.md").read_text()
    assert text.startswith("# Profile of one prompt batch") and "`aten::" in text
