"""What "exact" means, as checks, and the dense code that ours must equal: for tests, here and of any backend or SAE."""

from flashsae.testing.checks import assert_as_accurate, integer_inputs, poison_empty
from flashsae.testing.composed import oracle
from flashsae.testing.gates import dense_gated, dense_jump_relu, dense_pre_act_loss
from flashsae.testing.oracles import (
    ORACLES,
    DenseStep,
    Oracle,
    Params,
    TopK,
    chosen,
    dense_abs_topk,
    dense_batch_topk,
    dense_decode,
    dense_pre_acts,
    dense_reconstruction,
    dense_topk,
    stable_topk,
)
from flashsae.testing.training import AUXK, DenseTrainer, UnitNormAdam, dense_auxk

__all__ = [
    "AUXK",
    "ORACLES",
    "DenseStep",
    "DenseTrainer",
    "Oracle",
    "Params",
    "TopK",
    "UnitNormAdam",
    "assert_as_accurate",
    "chosen",
    "dense_abs_topk",
    "dense_auxk",
    "dense_batch_topk",
    "dense_decode",
    "dense_gated",
    "dense_jump_relu",
    "dense_pre_act_loss",
    "dense_pre_acts",
    "dense_reconstruction",
    "dense_topk",
    "integer_inputs",
    "oracle",
    "poison_empty",
    "stable_topk",
]
