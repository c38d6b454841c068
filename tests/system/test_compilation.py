"""The compiled loops: one graph a function, no recompilation after the first batch,
and what the plain loops compute."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lpo_fast import config, train_lpo, train_lrm
from lpo_fast.config import LPO, LRM
from lpo_fast.lpo import judging, policies, sampling, steps
from lpo_fast.lrm import checkpoint
from lpo_fast.method import schedule
from lpo_fast.models import attention, denoisers, texts
from lpo_fast.shapes import world
from lpo_fast.system import compilation
from tests.helpers.pairs import plain, table
from tests.helpers.runs import rows


@pytest.fixture
def lpo(small: Path, tmp_path: Path) -> LPO:
    """Prompt batches of 3, 3 and 1; 4 pairs a pass, the last one partial."""
    made = checkpoint.new_lrm(small, generator=torch.Generator().manual_seed(0))
    checkpoint.save_lrm(made, texts.load_tokenizers(small, made.family), tmp_path / "lrm")
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:7]))
    return replace(config.sd15().lpo, model=str(small), lrm=str(tmp_path / "lrm"),
                   prompts=str(tmp_path / "prompts.json"), out=str(tmp_path / "plain"),
                   pictures=0, batch_size=3, num_steps=3, num_candidates=2, train_batch_size=4,
                   epochs=1, threshold_min=0.0, threshold_max=0.001, beta=5.0, learning_rate=1e-4)


@pytest.fixture
def lrm(small: Path, tmp_path: Path) -> LRM:
    colours = [plain((40 * i, 255 - 40 * i, 90)) for i in range(6)]
    pairs = table(tmp_path / "p.parquet", list("abcabc"), jpg_0=colours, jpg_1=colours[::-1])
    return replace(config.sd15().lrm, model=str(small), pairs=str(pairs), validation_pairs=str(pairs),
                   num_workers=0, out=str(tmp_path / "plain"), batch_size=4, accumulate=2, max_steps=3,
                   validate_steps=2, warmup_steps=0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator, which takes minutes."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def compiled_twice(train: Callable, settings: LPO | LRM,
                   capsys: pytest.CaptureFixture) -> tuple[Path, Path, int]:
    """Run directories without and with compilation, and how many graphs there were."""
    plain_run = train(settings)
    made = train(replace(settings, compile="default", out=settings.out + "_compiled"))
    assert "cannot be compiled" not in capsys.readouterr().out and not counters["graph_break"]
    return plain_run, made, counters["stats"]["unique_graphs"]


def test_lpo(traced: None, lpo: LPO, capsys: pytest.CaptureFixture) -> None:
    """Three graphs: the sampling step, the policy with gradient, the reference.
    Each prompt batch has the same shapes."""
    plain_run, made, graphs = compiled_twice(train_lpo.train, lpo, capsys)
    assert graphs == 3
    assert len(rows(made, "batch")) == 3
    for kind in ("batch", "train"):
        for a, b in zip(rows(plain_run, kind), rows(made, kind), strict=True):
            assert {k: v for k, v in a.items() if not isinstance(v, float)} == {k: v for k, v in b.items()
                                                                              if not isinstance(v, float)}
            assert {k: v for k, v in a.items() if isinstance(v, float)} == pytest.approx(
                {k: v for k, v in b.items() if isinstance(v, float)}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointing(monkeypatch: pytest.MonkeyPatch, small: Path, how: str) -> None:
    """A training pass that recomputes is one graph too, and its gradients are those of the plain one."""
    torch.compiler.reset()
    counters.clear()
    # which cuts out the backward pass
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
    grads = []
    for setting in ("none", "default"):
        unet = denoisers.load_unet(small).requires_grad_(True)
        attention.attention(unet, "sdpa")
        attention.checkpointing(unet, how if setting == "default" else "none")
        step = compilation.compiled(lambda unet, *inputs: unet(*inputs).sample.square().mean(), setting)
        step(unet, x, torch.tensor([5, 500]), context).backward()
        grads.append([p.grad for p in unet.parameters()])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_lrm(traced: None, lrm: LRM, capsys: pytest.CaptureFixture) -> None:
    """Two graphs: the VAE, and the network with gradient."""
    plain_run, made, graphs = compiled_twice(train_lrm.train, lrm, capsys)
    assert graphs == 2
    for a, b in zip(rows(plain_run, "train"), rows(made, "train"), strict=True):
        assert a.pop("kind") == b.pop("kind") and a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_operations_are_counted_beside_compiled_steps(traced: None, lpo: LPO) -> None:
    """As a run on a GPU does before its first step: the numbers are those of plain code,
    and the steps stay compiled."""
    prompts, device = json.loads(Path(lpo.prompts).read_text()), torch.device("cpu")
    found = []
    for setting in ("none", "default"):
        settings = replace(lpo, compile=setting)
        actor, sched = policies.load(settings, prompts, device)
        judge = judging.load_score(settings, prompts, device)
        compiled = actor._compiled
        found.append(steps.work(actor, judge, sched, policies.latent_shape(settings, actor.unet), settings))
        assert actor._compiled is compiled
    assert found[0] == found[1] and min(found[0].values()) > 0


def test_a_cuda_graph_would_copy_nothing_of_the_run(monkeypatch: pytest.MonkeyPatch, lpo: LPO) -> None:
    """What is copied into a CUDA graph of the sampling step at every replay, since its place may change,
    is a batch's."""
    inputs: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, examples: list) -> Callable:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for node, example in zip(nodes, examples, strict=True):
            static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            if (isinstance(example, torch.Tensor) and not static
                    and not isinstance(example, torch.nn.Parameter)):
                inputs.append(tuple(example.shape))
        return graph.forward
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = compilation.compiled
    monkeypatch.setattr(compilation, "compiled", lambda function, setting, graphs=False: (
        compiled(function, setting, graphs=True) if graphs else function))
    train_lpo.train(replace(lpo, compile="default", max_batches=1))
    assert inputs and all(not shape or shape[0] in (lpo.batch_size, lpo.num_candidates)
                          for shape in inputs), inputs


def test_what_cannot_be_compiled_runs_as_it_is(capsys: pytest.CaptureFixture) -> None:
    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x
    function = compilation.compiled(reads, "default")
    assert function(torch.ones(2)).tolist() == function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert capsys.readouterr().out.count("warning: ") == 1
    assert compilation.compiled(reads, "none") is reads


def test_a_compiler_may_fail_in_any_way(monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture) -> None:
    """At the first call the function runs as it is; what a compiled one raises later is its own."""
    def broken(graph: torch.fx.GraphModule, examples: list) -> Callable:
        def call(*_) -> None:
            raise RuntimeError("out of resource: shared memory")  # as Triton says at the first launch
        return call
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    function = compilation.compiled(lambda x: x * 2, "default")
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert "cannot be compiled and runs uncompiled, slower: out of resource" in capsys.readouterr().out


def test_errors_of_the_function_itself_pass(traced: None) -> None:
    function = compilation.compiled(lambda x: torch.cat([x, x[:, :1]]), "default")
    with pytest.raises(RuntimeError):
        function(torch.ones(2, 2))


def test_a_prompt_batch_reads_nothing_back() -> None:
    """On fake tensors, where any host read raises."""
    with FakeTensorMode():
        sched = schedule.ddim(torch.linspace(0.999, 0.01, 1000), torch.arange(951, 0, -50), 20)
        gap = torch.zeros(1000)
        index = torch.arange(3)
        draw = sampling.CounterNoise(0, 1, index, (4, 8, 8))
        pairs, scores = sampling.trajectory(lambda x, t, prompts: torch.cat([x, x]),
                                            lambda x, t, prompts: x.mean((1, 2, 3)), sched, gap, draw, index,
                                            guidance=7.5, num_candidates=4)
        assert pairs.x_t.shape == (60, 4, 8, 8) and scores.shape == (20, 4, 3)
        with pytest.raises(DataDependentOutputException):
            pairs.valid.any().item()
