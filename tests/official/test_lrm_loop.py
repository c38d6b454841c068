"""bench/official/lrm_loop.py, our statement of the official LRM step, and the loop: equal loss and gradients.

The statement's own correctness rests on tests/golden, which holds the loop to the official code.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bench.official import lrm_loop as official_lrm_loop
from lpo_fast.config import LRM
from lpo_fast.lrm import checkpoint, encoding, steps
from lpo_fast.method import noise
from lpo_fast.shapes import world
from tests.helpers.models import DEVICE

STEP = 8e-5  # max|a − b| / max|b| of a training step in fp32, as in README.md
PAIRS = 5


@pytest.fixture(params=["sd15", "sdxl"])
def run(request: pytest.FixtureRequest, tiny_sd: Path) -> SimpleNamespace:
    """A step in miniature, with ties and with prompts of several pairs:
    the loop's parts, its batch, and the statement."""
    model = tiny_sd if request.param == "sd15" else request.getfixturevalue("tiny_sdxl")
    config = LRM(model=str(model), mixed_precision="no", logit_scale=3.0, max_grad_norm=0.1)
    lrm = checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(config.seed)).to(DEVICE).train()
    lrm.logit_scale.data.fill_(config.logit_scale)
    encoder = encoding.Encoder(model, lrm, config.seed, "no")
    pixels = torch.rand(2, PAIRS, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"rows": torch.arange(3, 3 + PAIRS), "captions": world.captions(held_out=False)[:PAIRS],
             "labels": torch.tensor([[1.0, 0.0, 0.5, 0.0, 1.0], [0.0, 1.0, 0.5, 1.0, 0.0]]),
             "counts": torch.tensor([1, 2, 3, 1, 7]), "compare": torch.zeros(PAIRS, dtype=torch.bool),
             "corrupt": torch.zeros(PAIRS, dtype=torch.bool), "pixels": pixels}
    batch = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return SimpleNamespace(config=config, lrm=lrm, encoder=encoder, batch=batch,
                           official=official_lrm_loop.load(config, DEVICE))


def ours(run: SimpleNamespace) -> Tensor:
    """The loss; gradients are left on the parameters."""
    mean, std = run.encoder.posterior(run.batch)
    weight = (1 / run.batch["counts"]).sum()
    loss, _ = steps.pair_loss(run.lrm, run.encoder, run.batch | {"mean": mean, "std": std}, 0, run.config,
                              weight)
    loss.backward()
    return loss.detach()


def stated(run: SimpleNamespace, step: Callable) -> Tensor | float:
    """What a step of the statement gives for the loop's pictures, noise and timesteps."""
    batch, config, official = run.batch, run.config, run.official
    shape = run.lrm.unet.config.in_channels, *[run.lrm.unet.config.sample_size] * 2
    z = noise.normal(config.seed, 0, batch["rows"], 0, 4, shape).unflatten(0, (2, 2)).flatten(1, 2)
    t, labels = encoding.timesteps(config, 0, batch["rows"], batch["compare"], batch["labels"])
    ids, _ = run.encoder.ids(batch["captions"])
    return step(ids, official.latents(batch["pixels"], z[0]), t, labels, batch["counts"], z[1])


def batches(lrm: nn.Module, vae: nn.Module) -> Counter:
    """What the networks will be given from now on."""
    counted: Counter = Counter()
    for name, modules in {"text": lrm.text_encoders, "denoiser": [lrm.unet.mid_block],
                          "pictures": [vae.encoder]}.items():
        def hook(_, args: tuple, kwargs: dict, name: str = name) -> None:
            counted[name] += len((*args, *kwargs.values())[0])
        for module in modules:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    return counted


def test_loss_and_gradients(run: SimpleNamespace) -> None:
    value, loss = ours(run), stated(run, run.official.loss)
    loss.backward()
    assert value.item() == pytest.approx(loss.item(), rel=STEP) and 0.1 < value < 10
    theirs = {name: p.grad for name, p in run.official.lrm.named_parameters()}
    gradients = {name: p.grad for name, p in run.lrm.named_parameters()}
    unused = theirs.keys() - gradients.keys()
    assert gradients.keys() < theirs.keys() and all(theirs[name] is None for name in unused)
    assert any("up_blocks" in name for name in unused)
    largest = max(g.abs().max().item() for g in theirs.values() if g is not None)
    for name, got in gradients.items():
        assert (got is None) == (theirs[name] is None), name
        if got is not None:
            # Keys' biases have no gradient: what is there is rounding of the others.
            limit = STEP * theirs[name].abs().max().item() + torch.finfo(torch.float32).eps * largest
            assert (got - theirs[name]).abs().max().item() < limit, name
    assert largest > 0.01 and sum(g is not None for g in gradients.values()) > 100


def test_evaluations(run: SimpleNamespace) -> None:
    """Sequences, denoiser passes and pictures of a step:
    B + 1 sequences an encoder in ours, 2B in the statement."""
    encoders, official = len(run.lrm.text_encoders), run.official
    counted = batches(run.lrm, run.encoder.vae)
    ours(run)
    assert counted == {"text": encoders * (PAIRS + 1), "denoiser": 4 * PAIRS, "pictures": 2 * PAIRS}
    counted = batches(official.lrm, official.vae)
    stated(run, official.loss)
    assert counted == {"text": encoders * 2 * PAIRS, "denoiser": 4 * PAIRS, "pictures": 2 * PAIRS}


def test_update(run: SimpleNamespace) -> None:
    """Torch's own clipping and AdamW on all parameters; the up blocks, which have no gradient, decay."""
    official, config = run.official, run.config
    stated(run, official.loss).backward()
    copies = [nn.Parameter(p.detach().clone()) for p in official.parameters]
    for copy, parameter in zip(copies, official.parameters, strict=True):
        copy.grad = torch.zeros_like(copy) if parameter.grad is None else parameter.grad.clone()
    norm = nn.utils.clip_grad_norm_(copies, config.max_grad_norm)
    assert norm > config.max_grad_norm
    torch.optim.AdamW(copies, lr=config.learning_rate, weight_decay=config.weight_decay).step()
    official.update()
    for copy, parameter in zip(copies, official.parameters, strict=True):
        assert torch.allclose(copy, parameter, rtol=1e-6, atol=1e-8) and parameter.grad is None
    held = sum(p.numel() for p in official.lrm.parameters())
    assert sum(x.numel() for x in official.optimizer.state[official.master].values()) == 2 * held + 1
    assert held > sum(p.numel() for p in run.lrm.parameters())


def test_bf16(run: SimpleNamespace) -> None:
    """As on CUDA: bf16 weights, fp32 masters, and a loss that is read."""
    expected = stated(run, run.official.loss).item()
    run.official = official = official_lrm_loop.load(replace(run.config, mixed_precision="bf16"), DEVICE)
    before = official.weights.clone()
    value = stated(run, official.train_step)
    assert isinstance(value, float) and value == pytest.approx(expected, abs=0.05)
    assert {p.dtype for p in (*official.parameters, *official.vae.parameters())} == {torch.bfloat16}
    assert official.master.dtype == torch.float32 and not before.equal(official.weights)
    assert official.master.bfloat16().equal(official.weights)
