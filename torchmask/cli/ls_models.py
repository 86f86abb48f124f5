"""`torchmask ls --models`: the families of models that folders of the Hub may hold, and the builders of each."""

import textwrap
from functools import partial

from torchmask.cli.terminal import console_for


def ls_models() -> int:
    """Prints a family and its models, its builders below them; nothing is wider than the terminal."""
    from torchmask import models  # with torch

    width = max(map(len, models.FAMILIES))
    indent = " " * (width + 2)
    fill = partial(textwrap.fill, width=console_for().width, subsequent_indent=indent, break_on_hyphens=False)
    print(f"{'MODEL_TYPE':<{width}}  MODELS, AND BUILDERS IN torchmask.models")
    for name, family in sorted(models.FAMILIES.items()):
        print(fill(f"{name:<{width}}  {family.title}"))
        print(fill(" ".join(models.builders_of(family)), initial_indent=indent))
    print("Any size of these loads: torchmask.models.from_pretrained(folder).")
    print("What each has of its own, and how to add one: docs/families.md.")
    return 0
