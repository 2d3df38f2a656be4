"""variance: `op.py` is the operation, `reference.py` what it means."""

from flashsae.ops.variance.op import total_variance as total_variance
