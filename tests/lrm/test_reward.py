"""The reward model against a slow statement on diffusers' whole U-Net, whose residuals are taken with hooks.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lpo_fast.lrm import reward
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import denoisers, families, texts
from lpo_fast.models.families import SD, SDXL, Family
from lpo_fast.models.texts import Text
from tests.helpers.models import CONFIGS

PROMPTS, LATENT = 3, (4, 16, 16)
SIZE = 64
# Positions of the last map before each down-sampler among all residuals, conv_in first.
RESIDUALS = {"sd15": (2, 5, 8, 11), "sdxl": (2, 5, 8)}


class World:
    """A whole U-Net and its text encoders, and the LRM that shares their weights, read from disk."""

    def __init__(self, name: str, folder: Path):
        torch.manual_seed(0)
        self.name, self.family = name, SD if name == "sd15" else SDXL
        self.unet = UNet2DConditionModel(**CONFIGS[f"unet_{name}"]).eval()
        self.unet.save_pretrained(folder)
        self.encoders: list[nn.Module] = [CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"])).eval()]
        if name == "sdxl":
            config = CLIPTextConfig(**CONFIGS["text_encoder_2"])
            self.encoders.append(CLIPTextModelWithProjection(config).eval())
        self.loaded = denoisers.load_down_mid(folder).eval()
        channels = CONFIGS[f"unet_{name}"]["block_out_channels"]
        widths = {True: sum(channels) + channels[-1], False: channels[-1]}  # with and without multi_scale
        self.visual = {multi_scale: torch.randn(12, width) * 0.1 for multi_scale, width in widths.items()}
        self.projection = torch.randn(12, 16) * 0.1 if name == "sd15" else None
        self.ids = [torch.randint(3, 256, (PROMPTS + 1, 77)) for _ in self.encoders]
        for ids in self.ids:
            ids[:, 0], ids[:, 10:] = 0, 2  # <|startoftext|> … <|endoftext|> as padding
        self.x, self.t = torch.randn(PROMPTS, *LATENT), torch.tensor([951, 401, 1])

    def lrm(self, **settings) -> LatentRewardModel:
        sizes = denoisers.time_ids(SIZE, SIZE) if self.name == "sdxl" else None
        visual = self.visual[settings.get("multi_scale", True)]
        return LatentRewardModel(self.family, self.loaded, self.encoders, visual, self.projection,
                                 torch.tensor(2.6592), sizes=sizes, **settings)

    def text(self, lrm: LatentRewardModel) -> Text:
        return lrm.encode([ids[:-1] for ids in self.ids], [ids[-1:] for ids in self.ids])

    def residuals(self, i: int, row: int) -> tuple[list[Tensor], Tensor]:
        """Pooled down features and the mid feature of latent i with the text of a row of ids,
        by the whole U-Net."""
        maps: list[Tensor] = []
        hooks = [self.unet.conv_in.register_forward_hook(lambda _m, _i, out: maps.append(out))]
        for block in self.unet.down_blocks:
            hooks.append(block.register_forward_hook(lambda _m, _i, out: maps.extend(out[1])))
        mids: list[Tensor] = []
        hooks.append(self.unet.mid_block.register_forward_hook(lambda _m, _i, out: mids.append(out)))
        context, pooled = self.context(row)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]])}
        self.unet(self.x[i:i + 1], self.t[i], context,
                  added_cond_kwargs=added if self.name == "sdxl" else None)
        for hook in hooks:
            hook.remove()
        return [maps[k].mean((2, 3))[0] for k in RESIDUALS[self.name]], mids[0].mean((2, 3))[0]

    def context(self, row: int) -> tuple[Tensor, Tensor]:
        outputs = [encoder(ids[row:row + 1], output_hidden_states=True)
                   for encoder, ids in zip(self.encoders, self.ids, strict=True)]
        if self.name == "sd15":
            return outputs[0].last_hidden_state, outputs[0].pooler_output
        return torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[1].text_embeds

    def slow(self, *, multi_scale: bool, multi_scale_cfg: bool,
             guidance_scale: float | tuple[float, float]) -> Tensor:
        """Scores by the definition, a latent and a branch at a time."""
        scores = []
        for i in range(PROMPTS):
            (down, mid), (null_down, null_mid) = self.residuals(i, i), self.residuals(i, PROMPTS)
            start, end = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale,) * 2
            g = start + (end - start) * self.t[i].item() / 999
            if g > 1:
                mid = null_mid + g * (mid - null_mid)
                if multi_scale_cfg:
                    untouched = 1 if self.name == "sdxl" else 0
                    down = [d if k < untouched else n + g * (d - n)
                            for k, (d, n) in enumerate(zip(down, null_down, strict=True))]
            v = self.visual[multi_scale] @ torch.cat([*(down if multi_scale else []), mid])
            words = self.context(i)[1][0]
            words = words if self.projection is None else self.projection @ words
            scores.append(math.exp(2.6592) * (v @ words) / (v.norm() * words.norm()))
        return torch.stack(scores)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp("unet"))


@pytest.mark.parametrize("multi_scale, multi_scale_cfg, guidance_scale", [
    (True, False, 7.5), (True, True, 7.5), (False, False, 7.5), (True, False, 1.0), (True, True, 0.5),
    (False, False, 0.5), (True, False, (1.5, 7.5)), (True, True, (0.0, 5.0)),
])
@torch.no_grad()
def test_score_equals_the_slow_statement(world: World, multi_scale: bool, multi_scale_cfg: bool,
                                         guidance_scale: float | tuple[float, float]) -> None:
    settings = {"multi_scale": multi_scale, "multi_scale_cfg": multi_scale_cfg,
                "guidance_scale": guidance_scale}
    lrm = world.lrm(**settings)
    got = lrm.score(world.x, world.t, world.text(lrm))
    assert got.shape == (PROMPTS,) and got.dtype == torch.float32
    assert torch.allclose(got, world.slow(**settings), rtol=1e-4, atol=2e-5 * math.exp(2.6592))


@torch.no_grad()
def test_every_setting_matters(world: World) -> None:
    scores = []
    for settings in ({}, {"multi_scale_cfg": True}, {"multi_scale": False}, {"guidance_scale": 1.0},
                     {"guidance_scale": 3.0}):
        lrm = world.lrm(**settings)
        scores.append(lrm.score(world.x, world.t, world.text(lrm)))
    for i, a in enumerate(scores):
        assert all((a - b).abs().max() > 1e-3 for b in scores[:i])


def test_up_blocks_are_neither_loaded_nor_trained(world: World) -> None:
    names = [name for name, _ in world.lrm().named_parameters()]
    assert not [name for name in names
                if "up_blocks" in name or "conv_out" in name or "conv_norm_out" in name]
    assert not [p for p in world.lrm().parameters() if p.is_meta]
    up = ("up_blocks.", "conv_out.", "conv_norm_out.")
    assert {n for n in world.unet.state_dict() if not n.startswith(up)} == set(world.loaded.state_dict())


@torch.no_grad()
def test_text_features_are_reused(world: World) -> None:
    lrm = world.lrm()
    text = world.text(lrm)
    scores = lrm.score(world.x, world.t, text)
    index = torch.tensor([2, 0, 2, 1])
    again = lrm.score(world.x[index], world.t[index], text[index])
    assert torch.allclose(again, scores[index], rtol=1e-5, atol=1e-5)
    other = replace(text, null=Text(text.null.context + 1, text.null.pooled + 1))
    assert (lrm.score(world.x, world.t, other) - scores).abs().max() > 1e-3


def test_gradient_reaches_every_part(world: World) -> None:
    lrm = world.lrm()
    lrm.score(world.x, world.t, world.text(lrm)).square().sum().backward()
    parts = [lrm.unet.conv_in, lrm.unet.time_embedding, lrm.unet.down_blocks[0], lrm.unet.mid_block,
             lrm.visual_projection, *lrm.text_encoders]
    parts += [lrm.text_projection] if lrm.text_projection else []
    for part in parts:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    assert lrm.logit_scale.grad.abs() > 0
    assert not [name for name, p in lrm.unet.named_parameters() if p.grad is None]
    lrm.zero_grad(set_to_none=True)


def test_guidance_of_every_timestep() -> None:
    table = reward.guidance_table((2.0, 11.99, 0.5))
    assert table.shape == (1000,) and table.dtype == torch.float32 and table[0] == 2 and table[999] == 1
    for t in (1, 250, 499):  # the middle number is at 499.5
        assert math.isclose(table[t], 2 + 9.99 * t / 499.5, rel_tol=1e-6)
    for t in (500, 700, 940):
        assert math.isclose(table[t], 11.99 - 11.49 * (t - 499.5) / 499.5, rel_tol=1e-6)
    assert torch.equal(reward.guidance_table([7.5]), torch.full((1000,), 7.5))
    assert torch.equal(reward.guidance_table([0.0, 0.9]), torch.ones(1000))


def test_the_null_pass_is_run_only_if_some_timestep_is_guided(world: World,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    rows, down_mid = [], denoisers.down_mid
    monkeypatch.setattr(denoisers, "down_mid",
                        lambda unet, x, *rest: rows.append(len(x)) or down_mid(unet, x, *rest))
    for scale in (7.5, (1.0, 1.5), 1.0, (0.0, 1.0), 0.5):
        lrm = world.lrm(guidance_scale=scale)
        lrm.score(world.x, world.t, world.text(lrm))
    assert rows == [2 * PROMPTS, 2 * PROMPTS, PROMPTS, PROMPTS, PROMPTS]


def test_linear() -> None:
    weight = torch.randn(3, 2, dtype=torch.float16)
    layer = reward.linear(weight)
    assert (layer.bias is None and layer.weight.dtype == torch.float32
            and torch.equal(layer.weight.half(), weight))


def test_normalized_is_single_precision_under_autocast() -> None:
    features = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        unit = reward.normalized(reward.linear(torch.randn(5, 8)), features)
    assert unit.dtype == torch.float32
    assert torch.allclose(unit.norm(dim=1), torch.ones(4), atol=1e-6)
    assert torch.equal(reward.normalized(None, features), features / features.norm(dim=1, keepdim=True))


# The backbone's own rules


def test_families() -> None:
    assert families.family_of(CONFIGS["unet_sd15"]) is SD and families.family_of(CONFIGS["unet_sdxl"]) is SDXL
    assert SD.tokenizers == ("tokenizer",) and SDXL.tokenizers == ("tokenizer", "tokenizer_2")
    assert not SD.zero_null and SDXL.zero_null and isinstance(SD, Family)


def test_predict_evaluates_both_branches(world: World) -> None:
    lrm = world.lrm()
    with torch.no_grad():
        text = world.text(lrm)
        null, with_text = denoisers.predict(world.unet, world.x, world.t, text, lrm.sizes).chunk(2)
        for i in range(PROMPTS):
            for got, row in ((null[i], PROMPTS), (with_text[i], i)):
                context, pooled = world.context(row)
                added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]])}
                expected = world.unet(world.x[i:i + 1], world.t[i], context,
                                      added_cond_kwargs=added).sample[0]
                assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


class Words:
    """A tokenizer: a fixed id a letter."""

    model_max_length = 77

    def __call__(self, prompts: list[str], **_) -> object:
        rows = [[0, *(3 + ord(letter) % 200 for letter in prompt)][:76] for prompt in prompts]

        class Out:
            input_ids = torch.tensor([row + [2] * (77 - len(row)) for row in rows])
        return Out


def test_encode_prompts(world: World) -> None:
    prompts = ["a red dog", "", "blue", "x" * 100, "green cat"]
    tokenizers = [Words()] * len(world.encoders)
    for zero in (False, True):
        text = texts.encode_prompts(world.family, tokenizers, world.encoders, prompts, zero_null=zero,
                                    batch=2)
        assert len(text) == 5 and text.null.context.shape == (1, *text.context.shape[1:])
        if zero:
            assert not text.null.context.any() and not text.null.pooled.any()
        else:
            assert torch.allclose(text.null.context[0], text.context[1], atol=1e-5)
            assert torch.allclose(text.null.pooled[0], text.pooled[1], atol=1e-5)
        alone = texts.encode_prompts(world.family, tokenizers, world.encoders, prompts[4:], zero_null=zero)
        assert torch.allclose(alone.context[0], text.context[4], atol=1e-5)
        half = text.to(torch.float16)
        assert half.null.pooled.dtype == half.context.dtype == torch.float16
