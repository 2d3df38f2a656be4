"""Names of shapes. The one legend of dimension names, used in annotations that tests check at run time.

B      tokens in a batch
d_in   width of the activations that go in (d_out: that come out; equal for an autoencoder)
d_sae  number of latents
k      latents kept for each token
nnz    B * k, entries of the sparse code
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Activations = Float[Tensor, "B d_in"]
Weights = Float[Tensor, "d_sae d_in"]
LatentBias = Float[Tensor, " d_sae"]
InputBias = Float[Tensor, " d_in"]
TopActs = Float[Tensor, "B k"]
TopIndices = Int[Tensor, "B k"]
LatentActs = Float[Tensor, "B d_sae"]

Choice = tuple[int, Bool[Tensor, " d_sae"] | None]
"""A selection: k latents of those that the mask allows, or of all."""
