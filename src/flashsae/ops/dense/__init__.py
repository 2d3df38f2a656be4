"""The operations as dense matrix products."""
