"""What is asked of a text beside its name, and the refusal of what means nothing for it."""

from __future__ import annotations

from dataclasses import dataclass

from flashsae.errors import ConfigError


@dataclass(frozen=True)
class AskedText:
    """Settings of a text; each is None, or False, where it is left open.

    Args:
        split: of a hub data set, a repository, or a folder whose files or folders are named after splits.
        column: that holds the text, or several.
        subset: of a hub data set or a repository.
        revision: of a hub data set.
        download: a hub data set, in place of streaming it.
        dtype: of the token ids in a file that does not tell it.
        separator: the id that stands between documents in a file of token ids.
        refused: where the names of what means nothing are collected; None raises an error of each.
    """

    split: str | None = None
    column: str | None = None
    subset: str | None = None
    revision: str | None = None
    download: bool = False
    dtype: str | None = None
    separator: int | None = None
    refused: set[str] | None = None

    def refuse(self, what: str, *names: str) -> None:
        """Raise ConfigError where settings are given that mean nothing for a text.

        Args:
            what: the text, in words.
            names: of the settings.
        """
        for name in names:
            value = getattr(self, name)
            if value is None or value is False:
                continue
            if self.refused is None:
                raise ConfigError(
                    f"text_{name}: expected nothing beside {what}, which has no such thing, got {value!r}."
                )
            self.refused.add(name)


ALL = ("split", "column", "subset", "revision", "download", "dtype", "separator")
"""The settings, by their names here."""
OF_HUB = ("revision", "download")
OF_TOKENS = ("dtype", "separator")
