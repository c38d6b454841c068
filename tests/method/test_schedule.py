"""DDIM coefficients against diffusers' own schedulers, and the last step against the formula in plain Python.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lpo_fast.kernels.ddim_candidates import ddim_candidates
from lpo_fast.method import schedule
from tests.helpers.models import CONFIGS

KINDS = ["epsilon", "v_prediction", "sample"]
CONFIG = CONFIGS["scheduler"]


def draws(dtype: torch.dtype, count: int = 3) -> tuple[torch.Tensor, ...]:
    """Some x_t, network output and noise, [2, 4, 3, 3]."""
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, 3, 3, dtype=dtype) for _ in range(count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("steps, eta", [(20, 1.0), (20, 0.3), (7, 1.0), (50, 0.5), (999, 1.0)])
def test_step_equals_diffusers(kind: str, clip: float | None, steps: int, eta: float) -> None:
    reference = DDIMScheduler(**CONFIG | {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0,
                                          "prediction_type": kind})
    reference.set_timesteps(steps)
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    sched = schedule.ddim(reference.alphas_cumprod, reference.timesteps, steps, eta, kind, clip)
    x, out, z = draws(torch.float64)
    # at the last ones p differs on purpose
    checked = [t for t in reference.timesteps.tolist() if t >= 1000 // steps]
    assert len(checked) >= steps - 1
    for t in checked[:: max(len(checked) // 40, 1)]:
        expected = reference.step(out, t, x, eta=eta, variance_noise=z).prev_sample
        outputs, at = torch.cat([out, out]), torch.tensor([t, t])
        got = ddim_candidates(sched, x, outputs, at, guidance=1.0, noise=z[None], candidates=1)[0]
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10), t


def python_step(a: list[float], t: int, steps: int, eta: float, kind: str, x: float, m: float,
                clip: float | None) -> tuple[float, float]:
    """Mean and standard deviation of x_p by the formula, on one number."""
    p = max(t - 1000 // steps, 0)
    if kind == "epsilon":
        x0, e = (x - math.sqrt(1 - a[t]) * m) / math.sqrt(a[t]), m
    elif kind == "v_prediction":
        x0, e = math.sqrt(a[t]) * x - math.sqrt(1 - a[t]) * m, math.sqrt(a[t]) * m + math.sqrt(1 - a[t]) * x
    else:
        x0, e = m, (x - math.sqrt(a[t]) * m) / math.sqrt(1 - a[t])
    if clip is not None:
        x0 = min(max(x0, -clip), clip)
    variance = eta**2 * (1 - a[p]) / (1 - a[t]) * (1 - a[t] / a[p])
    return math.sqrt(a[p]) * x0 + math.sqrt(1 - a[p] - variance) * e, math.sqrt(variance)


def alphas() -> list[float]:
    """alphas_cumprod of Stable Diffusion in plain Python."""
    product, products = 1.0, []
    for i in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
        product *= 1 - root**2
        products.append(product)
    return products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("steps, eta", [(20, 1.0), (7, 0.4), (50, 1.0), (999, 1.0)])
def test_first_and_last_step_equal_the_formula(kind: str, clip: float | None, steps: int, eta: float) -> None:
    a = alphas()
    config = CONFIG | {"prediction_type": kind, "clip_sample": clip is not None, "clip_sample_range": clip}
    sched = schedule.from_config(config, steps, eta)
    assert len(sched.timesteps) == steps and sched.timesteps[-1] == 1
    for t in (sched.timesteps[0].item(), 1):
        for x, m in ((0.3, -1.2), (2.5, 0.4), (-1.0, -0.1)):
            full = [torch.full((1, 1, 1, 1), value) for value in (x, m)]
            mean = schedule.mean(sched, *full, torch.tensor([t])).item()
            expected, deviation = python_step(a, t, steps, eta, kind, x, m, clip)
            assert mean == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert sched.sigmas[t].item() == pytest.approx(deviation, rel=1e-3)
            assert deviation > 0


def test_from_config_takes_the_models_own_settings() -> None:
    sched = schedule.from_config(CONFIG, 20)
    assert sched.timesteps.tolist() == list(range(951, 0, -50))
    assert sched.clip is None  # diffusers' own default would clip
    assert schedule.from_config({k: v for k, v in CONFIG.items() if k != "clip_sample"}, 20).clip is None
    assert schedule.from_config(CONFIG | {"clip_sample": True}, 20).clip == 1.0
    x, m, _ = draws(torch.float32)
    t = torch.tensor([951, 951])
    assert not torch.allclose(schedule.mean(sched, x, m, t), schedule.mean(
        schedule.from_config(CONFIG | {"clip_sample": True}, 20), x, m, t))
    trailing = schedule.from_config(CONFIG | {"timestep_spacing": "trailing"}, 20)
    assert trailing.timesteps[0] == 999
    linear = schedule.from_config(CONFIG | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
                                  20)
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.allclose(linear.alphas_cumprod.double(), expected, rtol=1e-4)


def test_sigma_table() -> None:
    sched = schedule.from_config(CONFIG, 20)
    sigmas = sched.sigmas[sched.timesteps]
    assert round(sigmas[-1].item(), 4) == 0.0206 and round(sigmas[0].item(), 4) == 0.6444
    assert (sigmas.diff() < 0).all()  # descending with the timestep
    assert torch.allclose(schedule.from_config(CONFIG, 20, eta=0.5).sigmas, sched.sigmas / 2)
    assert (schedule.from_config(CONFIG, 20, eta=0.0).sigmas == 0).all()
    assert sched.table.isfinite().all()


def test_add_noise_equals_ddpm() -> None:
    x0, z = draws(torch.float32, 2)
    t = torch.tensor([1, 951])
    expected = DDPMScheduler(**{k: v for k, v in CONFIG.items()
                                if k not in ("set_alpha_to_one", "steps_offset")})
    assert torch.allclose(schedule.add_noise(schedule.from_config(CONFIG, 20), x0, z, t),
                          expected.add_noise(x0, z, t), atol=1e-6)


def test_timesteps_of_a_batch_are_independent() -> None:
    sched = schedule.from_config(CONFIG, 20)
    x, m, _ = draws(torch.float32)
    both = schedule.mean(sched, x, m, torch.tensor([951, 51]))
    for i, t in enumerate((951, 51)):
        assert torch.equal(both[i:i + 1], schedule.mean(sched, x[i:i + 1], m[i:i + 1], torch.tensor([t])))


def test_moved_to_another_dtype() -> None:
    sched = schedule.from_config(CONFIG, 20).to(torch.float64)
    assert (sched.table.dtype == sched.alphas_cumprod.dtype == torch.float64
            and sched.timesteps.dtype == torch.int64)
    assert sched.sigmas.dtype == torch.float64


def test_unknown_prediction_type() -> None:
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, v_prediction, sample"):
        schedule.ddim(torch.tensor(alphas()), torch.tensor([1]), 20, prediction_type="flow")
