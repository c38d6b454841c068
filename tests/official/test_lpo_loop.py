"""bench/official/loop.py, our statement of the official computation, and the loop:
equal pairs, loss and gradients.

The statement's own correctness rests on bench/official/check.py and tests/golden,
which hold the loop to the official code.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.official import loop as official_loop
from bench.official.loop import Random
from lpo_fast.config import LPO
from lpo_fast.lpo import batches, judging, policies, steps
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.sampling import LatentPairs
from lpo_fast.lrm import checkpoint
from lpo_fast.method import noise, select
from lpo_fast.method.schedule import Schedule
from lpo_fast.models import denoisers, loras, texts
from lpo_fast.run import optimization
from lpo_fast.shapes import world
from tests.helpers.models import DEVICE
from tests.helpers.models import update as update_of

PROMPTS = world.captions(held_out=False)[:3]
RUN = 1e-4  # max|a − b| / max|b| after a whole sampling run in fp32, as in README.md
# of a training step's gradients, to which β times the rounding of log densities is added, as in README.md
STEP = 8e-5


class Counted(Random):
    """The numbers that the loop draws for prompts [B]."""

    def __init__(self, at: tuple[int, int, Tensor], shape: tuple[int, ...], candidates: int):
        super().__init__((len(at[2]), *shape), candidates, at[2].device, torch.float32)
        self.at = at

    def initial(self) -> Tensor:
        return noise.normal(*self.at, noise.INITIAL, 1, self.shape[1:])[0]

    def noise(self, step: int) -> Tensor:
        return noise.normal(*self.at, step, self.candidates, self.shape[1:])

    def choice(self, step: int) -> Tensor:
        return noise.integers(*self.at, step, self.candidates)


def lrm_of(model: Path, folder: Path) -> Path:
    """An LRM of a model, trained on nothing."""
    lrm = checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(1))
    checkpoint.save_lrm(lrm, texts.load_tokenizers(model, lrm.family), folder)
    return folder


@pytest.fixture(params=["sd15", "sd21", "sdxl"])
def config(request: pytest.FixtureRequest, tmp_path: Path, tiny_sd: Path, tiny_lrm: Path) -> LPO:
    """A run of a family in miniature. LoRAs start from B ≠ 0, so that policy and reference differ."""
    model, lrm = tiny_sd, tiny_lrm
    if request.param != "sd15":
        model = request.getfixturevalue({"sd21": "tiny_sd21", "sdxl": "tiny_sdxl"}[request.param])
    if request.param == "sdxl":
        lrm = lrm_of(model, tmp_path / "lrm")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    lora = denoisers.load_unet(model)
    loras.add_lora(lora, 4, 4, LPO().targets, 0)
    torch.manual_seed(2)
    for parameter in loras.trainable(lora):
        parameter.data = 0.2 * torch.randn_like(parameter)
    loras.save_lora(lora, tmp_path / "lora")
    return LPO(model=str(model), lrm=str(lrm), prompts=str(tmp_path / "prompts.json"), num_steps=5,
               num_candidates=3, lora=str(tmp_path / "lora"), mixed_precision="no", train_batch_size=100,
               beta=50.0, max_grad_norm=1e9, threshold_min=0.0, threshold_max=0.001)


class Both:
    """The loop's parts and the statement of the same run."""

    def __init__(self, config: LPO):
        self.config = config
        self.policy, self.sched = policies.load(config, PROMPTS, DEVICE)
        self.judge = judging.load_score(config, PROMPTS, DEVICE)
        self.official = official_loop.load(config, PROMPTS, DEVICE)
        if config.lora:
            loras.load_lora(self.official.unet, Path(config.lora))
        self.shape, self.index = (policies.latent_shape(config, self.policy.unet),
                                  torch.arange(len(PROMPTS), device=DEVICE))

    def ours(self) -> LatentPairs:
        gap = select.gaps(self.sched, self.config.threshold_shape, self.config.threshold_min,
                          self.config.threshold_max)
        return batches.sample_pairs(self.policy, self.judge, self.sched, gap, self.shape, self.index,
                                    self.config, 1, slots=len(self.index))[0]

    def stated(self) -> official_loop.Pairs:
        draw = Counted((self.config.seed, 1, self.index), self.shape, self.config.num_candidates)
        return self.official.sample(self.index, draw)[0]


def error(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@contextmanager
def modules_called() -> Iterator[Counter]:
    """How often a module of each class runs inside."""
    called: Counter = Counter()
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: called.update([type(module).__name__]))
    yield called
    hook.remove()


def margins(both: Both) -> Tensor:
    """Of all pairs, ascending."""
    scores = both.official.sample(both.index, Counted((both.config.seed, 1, both.index), both.shape,
                                                      both.config.num_candidates))[1]
    return (scores.amax(1) - scores.amin(1)).flatten().sort().values


def test_pairs_loss_and_gradients(config: LPO) -> None:
    """With thresholds that leave about half of the pairs, none of which is decided by rounding."""
    both = Both(config)
    margin = margins(both)
    middle = len(margin) // 2
    assert margin[middle] - margin[middle - 1] > 1e-5
    between = torch.tanh((margin[middle] + margin[middle - 1]) / 4).item()
    both.config = both.official.config = config = replace(config, threshold_shape="none",
                                                          threshold_min=between)
    ours, stated = both.ours(), both.stated()
    assert len(ours.t) == len(stated.t) == len(margin) - middle
    assert ours.t.tolist() == stated.t.tolist() and ours.prompt.tolist() == stated.prompt.tolist()
    for name in ("x_t", "winner", "loser"):
        assert error(getattr(ours, name), getattr(stated, name)) < RUN, name
    same = LatentPairs(stated.x_t, stated.winner, stated.loser, stated.t, stated.prompt,
                       torch.ones_like(stated.t, dtype=torch.bool))
    gradients, metrics = step_of_ours(both.policy, both.sched, same, config)
    loss, (win, lose, *densities) = both.official.loss(stated)
    loss.backward()
    assert (win != lose).any() and 0.01 < (win - lose).abs().max() < 0.2
    rounding = (STEP + 2 * config.beta * torch.finfo(torch.float32).eps
                * max(d.abs().max().item() for d in densities))
    expected = [loss, win.mean(), lose.mean(), *(d.exp().mean() for d in densities),
                (win > lose).float().mean(), (win - lose).mean()]
    assert metrics.tolist() == pytest.approx([x.item() for x in expected], rel=rounding, abs=1e-6)
    assert len(gradients) == len(both.official.parameters) > 20
    largest = max(p.grad.abs().max().item() for p in both.official.parameters)
    for got, parameter in zip(gradients, both.official.parameters, strict=True):
        # Queries and keys of attention over a single place have no gradient:
        # what is there is rounding of the others.
        limit = rounding * parameter.grad.abs().max().item() + torch.finfo(torch.float32).eps * largest
        assert (got - parameter.grad).abs().max().item() < limit
    assert rounding < 1e-3 and largest > 0.01


def step_of_ours(model: Policy, sched: Schedule, pairs: LatentPairs,
                 config: LPO) -> tuple[list[Tensor], Tensor]:
    """The gradients that the optimizer is given in a training step, and the step's metrics."""
    given: list[Tensor] = []
    optimizer = optimization.optimizer("adamw", model.unet.parameters(), lr=1e-4, weight_decay=0.0)
    optimizer.register_step_pre_hook(lambda *_: given.extend(p.grad.clone()
                                                             for p in loras.trainable(model.unet)))
    update = update_of(optimizer, config.train_batch_size, config.max_grad_norm)
    metrics = steps.train_step(model, sched, pairs, update, config)
    return given, metrics[:-1]


@pytest.mark.parametrize("shape", ["none", "linear", "sigma", "variance"])
def test_thresholds(tiny_sd: Path, tiny_lrm: Path, shape: str) -> None:
    """Of both for every timestep of a trajectory: a gap g is a threshold tanh(g / 2)."""
    config = LPO(model=str(tiny_sd), lrm=str(tiny_lrm), threshold_shape=shape, mixed_precision="no")
    official = official_loop.load(config, PROMPTS, DEVICE)
    _, sched = policies.load(config, PROMPTS, DEVICE)
    low = config.threshold_min
    gap = select.gaps(sched, shape, low, low if shape == "none" else config.threshold_max)[sched.timesteps]
    assert (official.threshold(sched.timesteps).tolist()
            == pytest.approx(torch.tanh(gap / 2).tolist(), rel=1e-5))


def test_evaluations(tiny_sd: Path, tiny_lrm: Path) -> None:
    """What each runs: text encoders not at all in ours, and half the evaluations of a training step."""
    config = LPO(model=str(tiny_sd), lrm=str(tiny_lrm), num_steps=4, num_candidates=3, mixed_precision="no",
                 threshold_shape="none", threshold_min=0.0, train_batch_size=100)
    both = Both(replace(config, lora=""))
    unet, mid, text = "UNet2DConditionModel", "UNetMidBlock2DCrossAttn", "CLIPTextModel"
    with modules_called() as sampling:
        pairs = both.ours()
    # the LRM runs the mid block alone
    assert (sampling[unet], sampling[mid], sampling[text]) == (4, 4 + 4, 0)
    with modules_called() as training:
        step_of_ours(both.policy, both.sched, pairs, config)
    assert (training[unet], training[text]) == (2, 0)
    with modules_called() as sampling:
        stated = both.stated()
    assert (sampling[unet], sampling[mid], sampling[text]) == (4, 4 + 4, 1 + 4)
    with modules_called() as training:
        metrics, = both.official.train(stated)
    assert (training[unet], training[text]) == (4, 0) and metrics["train_ratio_win"] == 1.0


def test_official_randomness(tiny_sd: Path, tiny_lrm: Path) -> None:
    """As official draws it: torch's generator decides, whatever the training batch every pair is used."""
    config = LPO(model=str(tiny_sd), lrm=str(tiny_lrm), num_steps=3, num_candidates=2, mixed_precision="no",
                 threshold_shape="none", threshold_min=0.0, train_batch_size=4)
    official, draws = official_loop.load(config, PROMPTS, DEVICE), []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(official.sample(torch.arange(3, device=DEVICE),
                                     Random((3, 4, 8, 8), 2, DEVICE, torch.float32))[0])
    assert len(draws[0].t) == 9 and all(a.equal(b) for a, b in zip(*draws, strict=True))
    before = [p.detach().clone() for p in official.parameters]
    assert len(official.train(draws[0])) == 3
    assert any(not a.equal(b) for a, b in zip(before, official.parameters, strict=True))
