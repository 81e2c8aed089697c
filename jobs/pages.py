"""How the HTML pages of jobs are filled in, and what several of them say alike.

Invariant: a page is self-contained, and all that comes from a run or a corpus is escaped; what a template uses and is
not given is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, **fields: Any) -> str:
    """The HTML of a page.

    Args:
        template: File name in `jobs/templates`.
        **fields: What it shows; text is escaped, `Markup` is not.
    """
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**fields)


def class_name(names: Sequence[str] | None, label: int) -> str:
    """What a page calls a class: its name, or its number where it has none."""
    return names[label] if names is not None and label < len(names) else f"class {label}"
