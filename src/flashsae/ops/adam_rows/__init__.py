"""adam_rows: `op.py` is the operation, `reference.py` what it means."""

from flashsae.ops.adam_rows.op import adam_rows as adam_rows
from flashsae.ops.adam_rows.op import row_squares as row_squares
from flashsae.ops.adam_rows.reference import AdamRule as AdamRule
