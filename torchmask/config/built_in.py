"""Where the built-in recipes and configurations lie."""

from pathlib import Path


def built_in_folder(kind: str) -> Path:
    """The folder of the built-in `recipes` or `configs`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / f"_{kind}"
    return installed if installed.is_dir() else package.parent / kind
