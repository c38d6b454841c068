"""Describe the operators of kernels/ as data: inputs of training size, bytes that must be moved, and the
check against fp64.

``doctor``, bench/ and the ahead-of-time compilation use these descriptions. Random numbers come only from
torch.rand*, so callers that do not need values can replace them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial, wraps

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpo_fast.kernels.ddim_candidates import ddim_candidates, ddim_candidates_reference
from lpo_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from lpo_fast.kernels.pair_loss import pair_loss, pair_loss_reference
from lpo_fast.kernels.pair_select import pair_select, pair_select_reference
from lpo_fast.kernels.reward_pool import reward_pool, reward_pool_reference
from lpo_fast.method import noise, schedule
from lpo_fast.method.noise import Counter

# of |error| / |exact|
BOUND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
CANDIDATES, PROMPTS, PAIRS = 4, 5, 10
LATENTS = {"sd15": {"side": 64}, "sd21": {"side": 96, "kind": "v_prediction"}, "sdxl": {"side": 128}}


@dataclass(frozen=True)
class Operator:
    """Describe an operator of kernels/.

    kernel, reference: the public function and its reference, called with the same positional arguments.
    sizes, small: keyword arguments of ``inputs`` by name, for training sizes and for a CPU. variants: other
    inputs that training launches, which are compiled ahead of time but not timed. inputs(device, **size): a
    tuple of arguments, with the same shapes every time. moved(arguments, backward): the bytes that must be
    read and written at least. differentiable(arguments): the tensors among them that get gradients; None if
    there is no backward pass. narrow: why a kernel (by its function's name) can have no 16-byte memory
    access.
    """

    kernel: Callable
    reference: Callable
    sizes: Mapping[str, dict]
    small: Mapping[str, dict]
    inputs: Callable[..., tuple]
    moved: Callable[[tuple, bool], int]
    differentiable: Callable[[tuple], Iterable[Tensor] | None] | None = None
    narrow: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the public function, also if it is wrapped in functools.partial."""
        return (self.kernel.func if isinstance(self.kernel, partial) else self.kernel).__name__

    def leaves(self, arguments: tuple) -> list[Tensor]:
        """Return the differentiable tensors, made to require gradients; [] if there is no backward pass."""
        return [x.requires_grad_() for x in (self.differentiable and self.differentiable(arguments)) or ()]

    def calls(self, function: Callable, inputs: list[tuple], backward: bool) -> list[Callable]:
        """Return one call per set of inputs: a forward pass without a graph, or a backward pass over a
        retained graph.
        """
        def forward(arguments: tuple):
            with torch.no_grad():
                return function(*arguments)
        if not backward:
            return [partial(forward, arguments) for arguments in inputs]
        made = []
        for arguments in inputs:
            tensors = self.leaves(arguments)
            outputs = [x for x in tree_leaves(function(*arguments))
                       if isinstance(x, Tensor) and x.requires_grad]
            draw = torch.Generator(outputs[0].device).manual_seed(0)
            # Multiples of 1/8, which are exact in half precision.
            grads = [torch.randint(-8, 9, x.shape, generator=draw, device=x.device).to(x.dtype) / 8
                     for x in outputs]
            made.append(partial(torch.autograd.grad, outputs, tensors, grads, retain_graph=True))
        return made

    def truth(self, arguments: tuple, backward: bool):
        """Return the reference's result in fp64, of the forward or of the backward pass."""
        call, = self.calls(self.reference, [_exact(arguments)], backward)
        return call()


def _exact(x):
    """Return an argument with its floating tensors in fp64, through lists, tuples, dicts and dataclasses."""
    if isinstance(x, Tensor):
        return x.detach().double() if x.is_floating_point() else x
    if is_dataclass(x):
        return replace(x, **{f.name: _exact(getattr(x, f.name)) for f in fields(x)})
    if isinstance(x, dict):
        return {key: _exact(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return x._make(map(_exact, x)) if hasattr(x, "_make") else type(x)(map(_exact, x))
    return x


def error(what: str, got, truth) -> float:
    """Return the largest |got − truth| / |truth| (Euclidean) over all results.

    Raises AssertionError where it exceeds BOUND. The check is coarse, for use with timings: integers must be
    equal, floats accurate to about a hundred roundings; the precise checks are in tests/.
    """
    got, truth = tree_leaves(got), tree_leaves(truth)
    worst = 0.0
    assert len(got) == len(truth), f"{what}: {len(got)} results, expected {len(truth)}"
    for i, (x, y) in enumerate(zip(got, truth, strict=True)):
        assert x.shape == y.shape, f"{what}, result {i}: {tuple(x.shape)}, expected {tuple(y.shape)}"
        if not x.is_floating_point():
            assert torch.equal(x, y), f"{what}, result {i}: {(x != y).sum().item()} of {x.numel()} differ"
            continue
        size = torch.linalg.vector_norm(y).item()
        distance = torch.linalg.vector_norm(x.double() - y).item()
        assert distance <= BOUND[x.dtype] * size, (
            f"{what}, result {i}: error of {distance:.3g}, but the result is {size:.3g}")
        worst = max(worst, distance / size if size else 0.0)
    return worst


# Inputs of each operator, and the bytes that it must move.


def _maps(device, batch: int, channels: tuple[int, ...], sides: tuple[int, ...], last: bool,
          dtype=torch.float16, all_guided: bool = False) -> tuple:
    """Return inputs of reward_pool: maps [2·batch, C, side, side], channels-last or NCHW.

    The last one is guided.

    all_guided: all maps but the first are guided.
    """
    maps = [torch.randn(2 * batch, s, s, c, device=device, dtype=dtype).permute(0, 3, 1, 2) if last else
            torch.randn(2 * batch, c, s, s, device=device, dtype=dtype)
            for c, s in zip(channels, sides, strict=True)]
    t = torch.randint(0, 1000, (batch,), device=device)
    return (maps, [False, *[all_guided] * (len(maps) - 2), True], t,
            torch.linspace(1, 7.5, 1000, device=device))


def _maps_moved(arguments: tuple, backward: bool) -> int:
    """Count the bytes of reward_pool.

    Backward: every gradient is written. Forward: the text branch is read, and of guided maps the null branch
    too. Both: the feature, in fp32.
    """
    maps, guided, t, _ = arguments
    rows = [len(stage) if with_guidance or backward else len(t)
            for stage, with_guidance in zip(maps, guided, strict=True)]
    return (sum(n * stage[0].nbytes for n, stage in zip(rows, maps, strict=True))
            + 4 * len(t) * sum(s.shape[1] for s in maps))


def _schedule(device, kind: str, clip: float | None = None) -> schedule.Schedule:
    """Return Stable Diffusion's schedule for 20 steps."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2,
                           0).float()
    return schedule.ddim(alphas, torch.arange(951, 0, -50), 20, prediction_type=kind, clip=clip).to(device)


def _outputs(device, rows: int, side: int, last: bool, dtype=torch.float16) -> Tensor:
    """Return network outputs [rows, 4, side, side], channels-last or NCHW."""
    outputs = torch.randn(rows, side, side, 4, device=device, dtype=dtype).permute(0, 3, 1, 2)
    return outputs if last else outputs.contiguous()


def _counter(device, batch: int) -> Counter:
    return Counter(*(torch.tensor(n, device=device) for n in ([42, 0], 3)),
                   torch.arange(batch, device=device))


def _step(device, side: int, kind: str = "epsilon", given: bool = False, last: bool = True,
          batch: int = PROMPTS, **how) -> tuple:
    """Return inputs of ddim_candidates: latents [batch, 4, side, side], outputs, and noise that is drawn or
    given.
    """
    x_t = torch.randn(batch, 4, side, side, device=device)
    t = torch.randint(1, 1000, (batch,), device=device)
    z = torch.randn(CANDIDATES, *x_t.shape, device=device) if given else _counter(device, batch)
    outputs = _outputs(device, 2 * batch, side, last, how.pop("dtype", torch.float16))
    return _schedule(device, kind, **how), x_t, outputs, t, z


def _step_moved(arguments: tuple, backward: bool) -> int:
    """Count the bytes of ddim_candidates: x_t and both branches are read, the candidates written, and given
    noise is read.
    """
    _, x_t, outputs, _, z = arguments
    return outputs.nbytes + x_t.nbytes * (1 + CANDIDATES + (0 if isinstance(z, Counter) else CANDIDATES))


def _scored(device, side: int, batch: int = PROMPTS) -> tuple:
    """Return inputs of pair_select: scores [K, batch], latents [K, batch, 4, side, side].

    About half of the pairs are valid.
    """
    return (torch.randn(CANDIDATES, batch, device=device),
            torch.randn(CANDIDATES, batch, 4, side, side, device=device),
            torch.linspace(1, 3, 1000, device=device), torch.randint(0, 1000, (batch,), device=device),
            _counter(device, batch))


def _scored_moved(arguments: tuple, backward: bool) -> int:
    """Count the bytes of pair_select: three latents are written, and those candidates read, each of them
    once.
    """
    scores, x_p, _, _, at = arguments
    choice = noise.integers(*at.run, at.items, at.step, len(scores))
    read = sum(len(set(three))
               for three in torch.stack([scores.argmax(0), scores.argmin(0), choice], 1).tolist())
    return (read + 3 * len(choice)) * x_p[0, 0].nbytes


def _pairs(device, side: int, kind: str = "epsilon", last: bool = True, pairs: int = PAIRS,
           dtype=torch.float16, **how) -> tuple:
    """Return inputs of pair_loss: latents [pairs, 4, side, side] and outputs, as early in training, with most
    ratios in bounds.
    """
    x_t, winner, loser = (torch.randn(pairs, 4, side, side, device=device) for _ in range(3))
    reference = _outputs(device, 2 * pairs, side, last, dtype)
    policy = reference + 1e-3 * _outputs(device, 2 * pairs, side, last, dtype)
    t = torch.randint(0, 20, (pairs,), device=device) * 50 + 1
    weight = torch.full((pairs,), 1 / pairs, device=device)
    return _schedule(device, kind, **how), x_t, winner, loser, t, policy, reference, weight


def _pairs_moved(arguments: tuple, backward: bool) -> int:
    """Count the bytes of pair_loss: three latents and the policy's outputs are read.

    The reference's are read or the gradient is written.
    """
    _, x_t, _, _, _, policy, *_ = arguments
    return 3 * x_t.nbytes + 2 * policy.nbytes


def _stepping(function: Callable) -> Callable:
    """Return ddim_candidates with noise as the last positional argument."""
    @wraps(function)
    def call(sched, x_t, outputs, t, z):
        return function(sched, x_t, outputs, t, guidance=5.0, noise=z, candidates=CANDIDATES)
    return call


def _block(device, batch: int, channels: int, side: int, groups: int = 32, dtype=torch.float16,
           shifted: bool = True, silu: bool = True) -> tuple:
    """Return inputs of group_norm_silu: a channels-last map [batch, C, side, side], for the second norm of a
    ResNet block.
    """
    x = torch.randn(batch, side, side, channels, device=device, dtype=dtype).permute(0, 3, 1, 2)
    weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
    shift = torch.randn(batch, channels, device=device, dtype=dtype) if shifted else None
    return x, groups, weight, bias, 1e-5, shift, silu


def _block_moved(arguments: tuple, backward: bool) -> int:
    """Count the bytes of group_norm_silu: the map is read and written; backward, its gradient is read too."""
    return arguments[0].nbytes * (3 if backward else 2)


# channels of the down blocks and the mid block
SD15, SDXL = (320, 640, 1280, 1280, 1280), (320, 640, 1280, 1280)
SCORED = CANDIDATES * PROMPTS
FORMS = {"sd15_bf16": {"side": 64, "dtype": torch.bfloat16},
         "sd15_fp32": {"side": 64, "dtype": torch.float32}, "sd15_clip": {"side": 64, "clip": 1.0}}
DPO = {"guidance": 5.0, "beta": 500.0, "eps": 0.1}
OPERATORS = {operator.name: operator for operator in (
    Operator(
        reward_pool, reward_pool_reference, inputs=_maps,
        moved=_maps_moved, differentiable=lambda arguments: arguments[0],
        sizes={"sd15": {"batch": SCORED, "channels": SD15, "sides": (64, 32, 16, 8, 8), "last": True},
               "sd15_nchw": {"batch": SCORED, "channels": SD15, "sides": (64, 32, 16, 8, 8), "last": False},
               "sd21": {"batch": SCORED, "channels": SD15, "sides": (96, 48, 24, 12, 12), "last": True},
               "sd21_nchw": {"batch": SCORED, "channels": SD15, "sides": (96, 48, 24, 12, 12), "last": False},
               "sdxl": {"batch": SCORED, "channels": SDXL, "sides": (128, 64, 32, 32), "last": True}},
        variants={"sd15_bf16": {"batch": 32, "channels": SD15, "sides": (64, 32, 16, 8, 8), "last": True,
                                "dtype": torch.bfloat16},
                  "sdxl_all": {"batch": 4, "channels": SDXL, "sides": (128, 64, 32, 32), "last": True,
                               "all_guided": True},
                  "sd15_one": {"batch": 1, "channels": SD15, "sides": (64, 32, 16, 8, 8), "last": True}},
        small={"small": {"batch": 4, "channels": (16, 32, 32), "sides": (16, 8, 8), "last": True}}),
    Operator(
        _stepping(ddim_candidates), _stepping(ddim_candidates_reference), inputs=_step, moved=_step_moved,
        sizes=LATENTS | {"sd15_nchw": {"side": 64, "last": False}, "sd15_given": {"side": 64, "given": True}},
        variants=FORMS | {"sd15_one": {"side": 64, "batch": 1}}, small={"small": {"side": 8}}),
    Operator(
        pair_select, pair_select_reference, inputs=_scored, moved=_scored_moved,
        sizes={name: {"side": size["side"]} for name, size in LATENTS.items()}, small={"small": {"side": 8}},
        variants={"sd15_one": {"side": 64, "batch": 1}}),
    Operator(
        partial(pair_loss, **DPO), partial(pair_loss_reference, **DPO), inputs=_pairs, moved=_pairs_moved,
        differentiable=lambda arguments: [arguments[5]],
        sizes=LATENTS | {"sd15_nchw": {"side": 64, "last": False}}, small={"small": {"side": 8}},
        variants=FORMS | {"sd15_one": {"side": 64, "pairs": 1}, "sdxl_four": {"side": 128, "pairs": 4}}),
    Operator(
        group_norm_silu, group_norm_silu_reference, inputs=_block, moved=_block_moved,
        differentiable=lambda arguments: [x for x in arguments if isinstance(x, Tensor)],
        sizes={"sd15": {"batch": 2 * SCORED, "channels": 320, "side": 64},
               "sd15_up": {"batch": 2 * PAIRS, "channels": 960, "side": 64},
               "sd15_mid": {"batch": 2 * SCORED, "channels": 1280, "side": 8},
               "sd21": {"batch": 2 * SCORED, "channels": 320, "side": 96},
               "sdxl": {"batch": 2 * SCORED, "channels": 320, "side": 128}},
        small={"small": {"batch": 2, "channels": 32, "side": 8, "groups": 8},
               "bare": {"batch": 2, "channels": 32, "side": 8, "groups": 8, "shifted": False, "silu": False}},
        variants={"first": {"batch": 40, "channels": 320, "side": 64, "shifted": False},
                  "attention": {"batch": 40, "channels": 640, "side": 32, "shifted": False, "silu": False},
                  "up_1920": {"batch": 20, "channels": 1920, "side": 32, "shifted": False},
                  "up_2560": {"batch": 20, "channels": 2560, "side": 16, "shifted": False},
                  "bf16": {"batch": 64, "channels": 320, "side": 64, "dtype": torch.bfloat16},
                  "one": {"batch": 1, "channels": 320, "side": 128}}),
)}
