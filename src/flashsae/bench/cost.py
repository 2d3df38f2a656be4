"""What a step should take, from three rates of the device: to plan for a GPU that is not at hand.

The constants below were fitted on one NVIDIA H200 (docs/performance.md); what they mean does not depend on it.
"""

from __future__ import annotations

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.setups import Shape
from flashsae.bench.stages import DECODE, ENCODE, INDEX, PASSES, REST

LAUNCHES_MS = 0.12  # kernels too small to be limited by anything but their launch
SORT_MS, ENTRY_MS, LATENT_MS = 0.045, 6.5e-8, 4e-8  # of the index: launches, each entry, each latent
CACHE_BYTES = 40e6  # of the second-level cache that rows stay in while weights stream through it
NEAR_BYTES, FAR_BYTES = 0.6e9, 4e9  # of W_dec: below, many rows are found in the cache; above, in no page table either
WHOLE_ROWS = 1.05  # of the decoder's pass, which sees whole rows, over the encoder's
NEAR_RATE, FAR_RATE = 1.3, 0.85  # times a copy
COLUMN_RATE = 0.85  # of a copy, with which the rows of W_enc are added up
RESCORED = 2.2  # rows that a screen of 8 bits leaves to be multiplied in float32, for each latent that is kept


def predict_stages(shape: Shape, ceilings: Ceilings) -> dict[str, float]:
    """Predict the milliseconds of each stage of a step in bf16, without AuxK and clipping.

    Args:
        shape: the size.
        ceilings: as measured, or from the data sheet of another device. gather_gbs of None counts as a copy. Where the
            dense product is one of int8, the step is one in bf16-int8.
    Source: ours, docs/performance.md#what-to-expect-of-a-step.
    """
    B, d, n, k = shape.batch_tokens, shape.d_in, shape.d_sae, shape.k
    copy = ceilings.copy_gbs * 1e6  # bytes a millisecond
    gather = (ceilings.gather_gbs or ceilings.copy_gbs) * 1e6
    rows, W_dec = 2.0 * B * k * d, 2.0 * n * d
    rate = NEAR_RATE if W_dec <= NEAR_BYTES else FAR_RATE if W_dec > FAR_BYTES else 1.0
    is_narrow = n < 2**15  # keys of 16 bits
    stream = 24.0 * n * d / copy
    selection = 2.0 * B * n / copy  # all products are read
    if ceilings.gemm_dtype == "int8":  # weights are rounded, maxima read twice, and rows of weights gathered
        selection = (3.0 * n * d + B * n / 4) / copy + RESCORED * rows / (rate * copy)
    return {
        ENCODE: 2.0 * B * d * n / (ceilings.gemm_tflops * 1e9) + selection,
        INDEX: (0.7 if is_narrow else 1.0) * SORT_MS + (0.5 if is_narrow else 1.0) * ENTRY_MS * B * k + LATENT_MS * n,
        DECODE: (rows + 8.0 * B * d) / (rate * copy),
        PASSES["W_enc_T"]: stream + rows / gather,
        PASSES["W_dec"]: WHOLE_ROWS * stream + rows / (gather if 2 * B * d <= CACHE_BYTES else copy),
        REST: W_dec / (COLUMN_RATE * copy) + 20.0 * B * d / copy + 150.0 * n / copy + LAUNCHES_MS,
    }
