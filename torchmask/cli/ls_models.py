"""`torchmask ls --models`: the families of models that folders of the Hub may hold, and the builders of each."""

import textwrap

from torchmask.cli.terminal import console_for


def ls_models() -> int:
    """Prints a family a line, its builders below it."""
    from torchmask import models  # with torch

    console = console_for()
    width = max(map(len, models.FAMILIES))
    indent = " " * (width + 2)
    print(f"{'MODEL_TYPE':<{width}}  MODELS, AND BUILDERS IN torchmask.models")
    for name, family in sorted(models.FAMILIES.items()):
        print(f"{name:<{width}}  {family.title}")
        names = " ".join(models.builders_of(family))
        print(textwrap.fill(names, console.width, initial_indent=indent, subsequent_indent=indent))
    print("Any size of these loads with torchmask.models.from_pretrained(folder); see docs/models.md.")
    return 0
