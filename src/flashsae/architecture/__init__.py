"""What an SAE architecture is, and how one is found by its name; docs/adding-an-architecture.md."""

from flashsae.architecture.composed import composed_name, composed_settings
from flashsae.architecture.description import (
    Architecture,
    architecture_named,
    architecture_names,
    architecture_of,
    register,
    settings_of,
)
from flashsae.architecture.parts import (
    AUTOENCODER,
    AUXK,
    NESTED,
    RECONSTRUCTION,
    X_MEAN,
    Parameter,
    Progress,
    Term,
)

__all__ = [
    "AUTOENCODER",
    "AUXK",
    "NESTED",
    "RECONSTRUCTION",
    "X_MEAN",
    "Architecture",
    "Parameter",
    "Progress",
    "Term",
    "architecture_named",
    "architecture_names",
    "architecture_of",
    "composed_name",
    "composed_settings",
    "register",
    "settings_of",
]
