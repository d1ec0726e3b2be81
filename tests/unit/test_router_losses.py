"""Do the router losses used to train the tiny checkpoint equal those of transformers and their formulas?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_models import comparison, generated
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "checkpoints"))

from router_losses import load_balancing_loss, router_z_loss


@pytest.mark.parametrize("seed", range(6))
def test_training_losses_equal_transformers_and_the_formula(seed: int) -> None:
    c = comparison("olmoe", seed)
    logits, active = c.trace.router_logits, generated("olmoe", seed)["num_experts_per_tok"]
    flat = tuple(layer.flatten(0, 1) for layer in logits)
    experts = generated("olmoe", seed)["num_experts"]
    assert torch.isclose(
        load_balancing_loss(logits, active, pooled=True), load_balancing_loss_func(flat, experts, active), rtol=1e-5
    )
    by_layer = torch.stack([load_balancing_loss_func((layer,), experts, active) for layer in flat]).mean()
    assert torch.isclose(load_balancing_loss(logits, active), by_layer, rtol=1e-5)
    z = torch.cat(flat).double().exp().sum(-1).log().square().mean()
    assert torch.isclose(router_z_loss(logits).double(), z, rtol=1e-5)


def test_load_balancing_detects_collapse_in_each_layer() -> None:
    balanced = torch.eye(4).repeat(8, 1) * 20
    collapsed = [torch.eye(4)[[e]].repeat(32, 1) * 20 for e in range(4)]
    assert load_balancing_loss([balanced], 1).item() == pytest.approx(1, abs=1e-3)
    assert load_balancing_loss(collapsed[:1], 1).item() == pytest.approx(4, abs=1e-3)
    # Four layers that collapse to different experts look balanced if the layers are pooled.
    assert load_balancing_loss(collapsed, 1).item() == pytest.approx(4, abs=1e-3)
    assert load_balancing_loss(collapsed, 1, pooled=True).item() == pytest.approx(1, abs=1e-3)
