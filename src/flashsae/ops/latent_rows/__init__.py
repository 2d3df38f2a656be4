"""latent_rows: `op.py` is the operation, `reference.py` what it means."""

from flashsae.ops.latent_rows.op import latent_rows as latent_rows
