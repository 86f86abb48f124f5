"""`python -m torchmask` is the `torchmask` command."""

from torchmask.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
