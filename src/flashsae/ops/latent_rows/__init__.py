"""latent_rows: `op.py` is the operation, `reference.py` what it means, `factors.py` the gradients made of it."""

from flashsae.ops.latent_rows.factors import collect_factors as collect_factors
from flashsae.ops.latent_rows.factors import materialize as materialize
from flashsae.ops.latent_rows.factors import take_rows as take_rows
from flashsae.ops.latent_rows.op import latent_rows as latent_rows
