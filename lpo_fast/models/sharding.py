"""Full fine-tuning with the weights, gradients and optimizer state cut over the processes: torch's FSDP2.

A parameter is then a DTensor, of which each process holds some rows; the weights of a block come together for its forward
and its backward pass. What is written is whole, so that any number of processes reads it. Alone, nothing is cut.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from lpo_fast.system import devices, distributed


def shard(unet: UNet2DConditionModel, precision: str) -> None:
    """Keep this process's part of a denoiser on its device, in place; all processes call it.

    precision: what the weights are rounded to when they come together (their parts, and the sums of gradients, stay as they
    are): autocast would keep a whole rounded copy from the forward pass to the backward pass.
    """
    device = distributed.state().device
    if distributed.world_size() == 1:
        unet.to(device)
        return
    for parameter in unet.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no others; maps stay channels-last
    half = {} if precision == "no" else {"param_dtype": devices.DTYPES[precision], "reduce_dtype": torch.float32}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        # After a forward pass the whole weights go, the outermost too: those that sampling left would miss an update.
        fully_shard(module, mesh=mesh, reshard_after_forward=True,
                    mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False))
        module.set_gradient_divide_factor(1.0)  # a sum, as in distributed.sum_gradients
        module.set_force_sum_reduction_for_comms(True)  # else it is a product with 1, which gloo has not


def clip(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Clip the norm of all gradients together; what it was."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(state: object) -> object:
    """A state_dict with whole tensors on the CPU for DTensors (None in processes other than the main one); all call it."""
    def gather(x: DTensor) -> Tensor | None:
        x = x.full_tensor()
        return x.cpu() if distributed.is_main() else None
    return tree_map_only(DTensor, gather, state)


def unsharded(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The denoiser that the main process writes: itself, or a whole copy on the CPU if it is cut; all call it."""
    if not any(isinstance(parameter, DTensor) for parameter in unet.parameters()):
        return unet
    state = gathered(unet.state_dict())
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    if distributed.is_main():
        copy.load_state_dict(state, assign=True)
    return copy


def part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor if ``like``, of the same shape, is cut; else the tensor itself."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    shard = distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)  # each cuts its own
    return shard.clone()  # else it keeps the whole one alive


def load(owner: object, state: dict) -> None:
    """``owner.load_state_dict`` of a whole state, be its tensors cut or not."""
    if isinstance(owner, torch.optim.Optimizer):
        own = dict(enumerate(p for group in owner.param_groups for p in group["params"]))
        state = state | {"state": {i: {name: part(x, own[i]) if isinstance(x, Tensor) else x for name, x in values.items()}
                                   for i, values in state["state"].items()}}
    elif isinstance(owner, EMAModel):
        state = state | {"shadow_params": [part(x, own) for x, own in zip(
            state["shadow_params"], owner.shadow_params, strict=True)]}
    owner.load_state_dict(state)
