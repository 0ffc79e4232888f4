"""Steps of the documentation's build (`hooks` in mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Show the docstrings' ``:class:`Name` `` as a plain ``Name``."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)
