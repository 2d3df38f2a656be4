"""Names of shapes. The one legend of dimension names, used in annotations that tests check at run time.

B      tokens in a batch
d_in   width of the activations that go in (d_out: that come out; equal for an autoencoder)
d_sae  number of latents
k      latents kept for each token
nnz    entries of the sparse code, B * k where every token has k
capacity  places for entries where tokens have different numbers of latents; some may be left over
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

Activations = Float[Tensor, "B d_in"]
Weights = Float[Tensor, "d_sae d_in"]
LatentBias = Float[Tensor, " d_sae"]
InputBias = Float[Tensor, " d_in"]
TopActs = Float[Tensor, "B k"]
TopIndices = Int[Tensor, "B k"]
LatentActs = Float[Tensor, "B d_sae"]

CodeActs = TopActs | Float[Tensor, " capacity"]
"""Values of a code, of either kind."""
