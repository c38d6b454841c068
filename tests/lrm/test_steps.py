"""A step of LRM training reads nothing back from the device."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lpo_fast.config import LRM
from lpo_fast.data import dataset
from lpo_fast.lrm import checkpoint, encoding, steps
from lpo_fast.run import optimization


def test_a_step_reads_nothing_back(tiny_sd: Path) -> None:
    """On the meta device, where reading a value raises; the scaler's steps are its own affair."""
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(0))
    lrm = lrm.to("meta").train()
    encoder = encoding.Encoder(tiny_sd, lrm, 0, "no")
    items = [{"row": i, "caption": "a", "pixels": torch.zeros(2, 3, 16, 16),
              "labels": torch.tensor([1.0, 0.0]), "count": 1, "compare": False, "corrupt": i == 1}
             for i in range(4)]
    optimizer = torch.optim.SGD([p for p in lrm.parameters() if p.requires_grad], lr=0.1)
    settings = LRM(compare_between_timestep=True, hflip=True, loss_type="both")
    scaler = SimpleNamespace(scale=lambda x: x, unscale_=id, is_enabled=lambda: True, step=lambda o: o.step(),
                             update=lambda: 0)
    update = optimization.OptimizerStep(optimizer, scaler, 1.0, 2, "")
    values = steps.train_step(lrm, encoder, dataset.collate(items), 0, update, settings)
    assert values.device.type == "meta" and values.shape == (4,)
    with pytest.raises(RuntimeError, match="meta"):
        values.tolist()
