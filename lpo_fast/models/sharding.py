"""Full fine-tuning with weights, gradients and optimizer state sharded across ranks, by torch's FSDP2.

Each parameter is a DTensor, of which each rank holds some rows; the weights of a block are all-gathered for
its forward and its backward pass. Checkpoints hold complete tensors, so that any number of ranks can read
them. With one rank nothing is sharded.
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
    """Keep this rank's shard of a denoiser on its device, in place; all ranks must call it.

    precision: the dtype to which the weights are rounded when they are gathered (the shards, and the sums of
    gradients, stay in fp32). With autocast instead, a complete rounded copy would stay in memory from the
    forward to the backward pass.
    """
    device = distributed.state().device
    if distributed.world_size() == 1:
        unet.to(device)
        return
    for parameter in unet.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP requires it; maps stay channels-last
    half = {} if precision == "no" else {"param_dtype": devices.DTYPES[precision],
                                         "reduce_dtype": torch.float32}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        # Free all gathered weights after a forward pass, the outermost too: weights kept from sampling would
        # be out of date after an update.
        fully_shard(module, mesh=mesh, reshard_after_forward=True,
                    mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False))
        module.set_gradient_divide_factor(1.0)  # a sum, as in distributed.sum_gradients
        module.set_force_sum_reduction_for_comms(True)  # else a product with 1, which gloo does not have


def clip(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Clip the norm of all gradients together; return the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(state: object) -> object:
    """Return a state_dict with complete CPU tensors in place of DTensors (None on ranks other than 0).

    All ranks must call it.
    """
    def gather(x: DTensor) -> Tensor | None:
        x = x.full_tensor()
        return x.cpu() if distributed.is_main() else None
    return tree_map_only(DTensor, gather, state)


def unsharded(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the denoiser to be written by rank 0: itself, or a complete copy on the CPU if it is sharded.

    All ranks must call it.
    """
    if not any(isinstance(parameter, DTensor) for parameter in unet.parameters()):
        return unet
    state = gathered(unet.state_dict())
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    if distributed.is_main():
        copy.load_state_dict(state, assign=True)
    return copy


def part(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor if ``like``, of the same shape, is sharded.

    Otherwise the tensor itself is returned.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # src_data_rank=None: every rank takes its shard of its own copy, without communication.
    shard = distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)
    return shard.clone()  # a view would keep the complete tensor alive


def load(owner: object, state: dict) -> None:
    """Call ``owner.load_state_dict`` with a complete state, whether the tensors of ``owner`` are sharded or
    not.
    """
    if isinstance(owner, torch.optim.Optimizer):
        own = dict(enumerate(p for group in owner.param_groups for p in group["params"]))
        state = state | {"state": {i: {name: part(x, own[i]) if isinstance(x, Tensor) else x for name, x
                                       in values.items()} for i, values in state["state"].items()}}
    elif isinstance(owner, EMAModel):
        state = state | {"shadow_params": [part(x, own) for x, own in zip(
            state["shadow_params"], owner.shadow_params, strict=True)]}
    owner.load_state_dict(state)
