"""A run, from its settings to trained SAEs, their reports and exports: what `flashsae train` makes."""
