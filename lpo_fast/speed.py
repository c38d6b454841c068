"""Precision, attention, memory format, compilation and optimizer: every such choice of the project is made here."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec

import torch
import torch._functorch.config
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from lpo_fast import runs
from lpo_fast.errors import InputError

# The modes of torch.compile by --compile and whether launches become a CUDA graph.
MODES = {("default", False): "default", ("default", True): "reduce-overhead",
         ("max", False): "max-autotune-no-cudagraphs", ("max", True): "max-autotune"}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(setting: str, on_cuda: str) -> str:
    """"auto" becomes ``on_cuda`` on a GPU and "no" elsewhere."""
    return (on_cuda if torch.cuda.is_available() else "no") if setting == "auto" else setting


def autocast(setting: str) -> torch.autocast:
    """The context in which networks run; latents, densities and scores stay in fp32 around it."""
    return torch.autocast(device().type, DTYPES[setting], enabled=setting != "no")


OPTIMIZERS = {"adamw": "torch", "adafactor": "transformers", "adamw8bit": "bitsandbytes", "paged_adamw8bit": "bitsandbytes"}


def check_optimizer(name: str) -> None:
    """Raise InputError if the package of an optimizer is not installed."""
    if find_spec(OPTIMIZERS[name]) is None:
        raise InputError(name, f"{OPTIMIZERS[name]} is not installed", f"pip install {OPTIMIZERS[name]}, or use adamw",
                         "--optimizer")


def optimizer(name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float,
              **adam) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train. adam: betas and eps of the AdamWs; Adafactor has none."""
    parameters = [p for p in parameters if p.requires_grad]
    check_optimizer(name)
    if name == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=torch.cuda.is_available(), **adam)
    from bitsandbytes import optim
    cls = {"adamw8bit": optim.AdamW8bit, "paged_adamw8bit": optim.PagedAdamW8bit}[name]
    return cls(parameters, lr=lr, weight_decay=weight_decay, **adam)


def optimizer_state(name: str, parameters: list[nn.Parameter]) -> int:
    """Bytes of an optimizer's state. AdamW: two fp32 moments. 8 bits: two bytes and, a block of 256, two fp32 scales; fp32
    below 4,096 elements. Adafactor: fp32 row and column means of the squares, one by one for vectors."""
    def each(p: nn.Parameter) -> int:
        if name == "adafactor":
            return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())
        if name == "adamw" or p.numel() < 4096:
            return 8 * p.numel()
        return 2 * p.numel() + 8 * -(-p.numel() // 256)
    return sum(map(each, parameters))


def xformers_problem() -> str:
    """Why xformers' attention cannot run on this device; "" if it can."""
    if find_spec("xformers") is None:
        return "is not installed"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        from xformers.ops import memory_efficient_attention
        q = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda")
        memory_efficient_attention(q, q, q)
    except Exception as error:  # built for another torch or GPU: the kinds are many
        return f"does not run here ({str(error).splitlines()[0][:160]})"
    return ""


def check_attention(choice: str) -> None:
    """Raise InputError if xformers is asked for where it cannot run."""
    if choice == "xformers" and (problem := xformers_problem()):
        raise InputError(choice, problem, "use sdpa, which computes the same, or the xformers built for this torch",
                         "--attention")


def attention(unet: nn.Module, choice: str) -> None:
    """How a denoiser computes attention: "sdpa" (torch's own) or "xformers". Raises InputError where that cannot run."""
    check_attention(choice)
    if choice == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0())


def faster_attention(run: Callable[[], Tensor], unet: nn.Module) -> str:
    """The attention with which ``run``, an evaluation of ``unet`` at the run's own shapes, is faster; medians of 5 each.

    Where xformers does not run there is no choice: "sdpa". In both cases it is said.
    """
    if problem := xformers_problem():
        runs.say(f"attention: sdpa; xformers {problem}")
        return "sdpa"
    seconds = {}
    for choice in ("sdpa", "xformers"):
        attention(unet, choice)
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[choice] = statistics.median(times[2:])
    best = min(seconds, key=seconds.get)
    measured = ", ".join(f"{s * 1e3:.1f} ms with {name}" for name, s in seconds.items())
    runs.say(f"attention: {best}; an evaluation takes {measured}")
    return best


def text_home(size: int) -> torch.device:
    """Where ``size`` bytes of text features are kept: on the GPU if they take a quarter of its free memory at most."""
    if torch.cuda.is_available() and size > torch.cuda.mem_get_info()[0] // 4:
        return torch.device("cpu")
    return device()


def deterministic(setting: bool) -> None:
    """Equal bits on repeat on one GPU: operations use their deterministic form, those without raise RuntimeError (see
    ``guard.told``). CPUs need nothing."""
    if setting:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(setting)  # with warn_only attention's backward pass would not


def layout(unet: nn.Module) -> nn.Module:
    """Channels-last on a GPU, whose convolutions want it."""
    return unet.to(memory_format=torch.channels_last) if torch.cuda.is_available() else unet


def kept(_, operation: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    """Of selective checkpointing: convolutions and attention take the most time for a byte of what they give."""
    dear = any(word in str(operation) for word in ("convolution", "attention", "flash_fwd"))  # the last is xformers'
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(how: str, block: Callable, *inputs) -> Tensor:
    """A block whose activations are computed again in the backward pass: all ("full"), or all that is not ``kept``."""
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if how == "selective" else {}
    return activation_checkpoint(block, *inputs, use_reentrant=False, **selective)


def checkpointing(unet: nn.Module, how: str) -> None:
    """Which activations inside a denoiser's blocks are kept for the backward pass: --checkpointing."""
    if how != "none":
        unet.enable_gradient_checkpointing(partial(recomputed, how))


def compiled(function: Callable, setting: str, *, graphs: bool = False) -> Callable:
    """``function`` compiled as --compile says: as one graph and for the shapes it is called with ("auto": on a GPU).

    graphs: for a function without gradient that returns tensors; on CUDA its launches are replayed as a CUDA graph, and what
    it returns is copied out of the graph's memory. Where it cannot be compiled it runs as it is, and a warning says why.
    """
    setting = ("default" if torch.cuda.is_available() else "none") if setting == "auto" else setting
    if setting == "none":
        return function
    torch._functorch.config.force_non_lazy_backward_lowering = True  # one that cannot be compiled shows in the forward
    graphs = graphs and torch.cuda.is_available()
    fast, ran = torch.compile(function, fullgraph=True, dynamic=False, mode=MODES[setting, graphs]), False

    def call(*arguments):
        nonlocal fast, ran
        if fast is function:
            return function(*arguments)
        if not ran:
            from torch._inductor.runtime.cache_dir_utils import cache_dir
            runs.say(f"compiling {function.__qualname__}: minutes the first time; what is compiled is kept in {cache_dir()}")
        try:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            returned = fast(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a first call: compilers fail in many ways, and the function's own errors come again
            if ran and not isinstance(error, TorchDynamoException):
                raise
            runs.say(f"warning: {function.__qualname__} cannot be compiled and runs as it is, slower: "
                     f"{str(error).strip().splitlines()[0][:200]}")
            fast = function
            return function(*arguments)
        ran = True
        return tuple(x.clone() for x in returned) if graphs else returned
    return call


def stay(*tensors: Tensor) -> None:
    """Say that these are never anywhere else: a CUDA graph reads them where they are, and others' copies at every replay."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def unread() -> int:
    """Steps whose metrics a loop leaves on the device for a while: on a GPU the last one's, which are read when the next one is
    queued behind it, so that reading leaves no gap; elsewhere none."""
    return int(torch.cuda.is_available())


def learning_rate(warmup: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Factor of the peak rate at optimizer step k = 0, 1, …: warm-up, then linear decay to 0 at max_steps."""
    def factor(k: int) -> float:
        if k < warmup_steps and warmup == "linear":
            return (k + 1) / warmup_steps
        if k < warmup_steps:  # DeepSpeed's logarithmic warm-up
            return float(torch.log(torch.tensor(k + 1.0)) / torch.log(torch.tensor(max(warmup_steps, 2.0))))
        return max(max_steps - k, 0) / max(max_steps - warmup_steps, 1)
    return factor
