"""Programs that tests run in several processes."""

STEPS = """
import sys, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from lpo_fast.lpo import steps
from lpo_fast.method import schedule
from lpo_fast.models import loras
from lpo_fast.run import states
from lpo_fast.system import distributed
from lpo_fast.models.texts import Text
from lpo_fast.config import LPO
from lpo_fast.run.optimization import OptimizerStep
from lpo_fast.lpo.policies import Policy
from lpo_fast.models.loras import trainable
from lpo_fast.lpo.sampling import LatentPairs
model, out = sys.argv[1:]
distributed.state()
torch.manual_seed(0)
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
loras.add_lora(unet, 2, 2, ("to_q", "to_out.0"), 0)
unet.double()
null = Text(torch.randn(1, 16, 16).double(), torch.zeros(1, 1))
text = Text(torch.randn(5, 16, 16).double(), torch.zeros(5, 1), null)
sched = schedule.ddim(torch.linspace(0.999, 0.01, 1000).double(), torch.arange(951, 0, -50), 20)
config = LPO(beta=5.0, guidance_scale=2.0)
update = OptimizerStep(torch.optim.SGD(trainable(unet), lr=10.0), torch.amp.GradScaler("cpu", enabled=False),
                       config.max_grad_norm, 6 // distributed.world_size(), "")
for step in range(5):
    n = 6 if step < 4 else 4  # the last one is smaller, in no process alike
    x = torch.randn(3, n, 4, 8, 8).double()
    pairs = LatentPairs(*x, torch.arange(1, 1 + 50 * n, 50), torch.arange(n) % 5,
                        torch.ones(n, dtype=torch.bool))
    row = steps.train_step(Policy(unet, text, None, full=False), sched, pairs, update, config)
row = dict(zip(steps.STEP, row.tolist(), strict=True))
distributed.barrier()
if distributed.is_main():
    torch.save((states.Trained(unet).state_dict(), row), out)
"""
