"""Markdown of a template in which nothing that comes from outside is taken for markup."""

from __future__ import annotations

import functools
import re
from typing import Any

from flashsae.errors import require
from flashsae.report.cards import printable

_SIGNS = re.compile(r"([\\`*_\[\]<>#|&~$])")


class Raw(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escaped(value: Any) -> str:
    """Return text as Markdown that shows it, in one line; Markdown as it is."""
    if isinstance(value, Raw):
        return value
    return _SIGNS.sub(r"\\\1", printable(str(value)))


def code(value: Any) -> Raw:
    """Return text as a piece of code, in one line; a bar is escaped, as tables want it."""
    text = printable(str(value)).replace("|", "\\|")
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return Raw(f"{fence}{space}{text}{space}{fence}")


@functools.cache
def template(name: str) -> Any:
    """Return a template of this folder, in which everything is escaped but what is `Raw`."""
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        autoescape=False,
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("flashsae.publish", ""),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["raw"] = Raw
    return environment.get_template(name)
