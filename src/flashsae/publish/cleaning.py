"""What settings must not tell to others: paths of the machine, of which the last part is left, and secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from flashsae.errors import ConfigError
from flashsae.report.setting_text import without_folders

_SECRETS = re.compile(
    r"""
    \b hf_[A-Za-z0-9]{16,}                         # of the Hugging Face hub
    | \b (?:sk|ghp|gho|ghs|ghu|glpat|xox[bp])[-_][\w-]{16,}   # of others
    | \b github_pat_\w{16,}
    | \b AKIA[0-9A-Z]{16} \b
    | :// [^/\s:@]* : [^/\s@]+ @                   # user and password in an address
    | \b (?: \w*token | \w*secret | [\w-]*signature | password | passwd | api_?key )
      \s*=\s* (?!true\b|false\b|none\b) [^\s,]{8,}
    """,
    re.VERBOSE | re.IGNORECASE,
)


def cleaned(value: Any, where: str, shortened: list[str]) -> Any:
    """Return settings or metadata as others may see them.

    Args:
        value: text, numbers, and lists and tables of these.
        where: what it is of, for messages.
        shortened: is extended by the name of everything of which only the last part is left.
    Raises:
        ConfigError: it holds what looks like a token or a password.
    """
    if isinstance(value, Mapping):
        return {name: cleaned(each, f"{where}: {name}", shortened) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(each, where, shortened) for each in value]
    if not isinstance(value, str | PurePath):
        return value
    text = str(value)
    if _SECRETS.search(text):
        raise ConfigError(
            f"{where} holds what looks like a token or a password, so nothing is pushed. Take it out of there, and "
            "give it by HF_TOKEN or another variable of the environment."
        )
    short = without_folders(text)
    if short != text and where not in shortened:
        shortened.append(where)
    return short
