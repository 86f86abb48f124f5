"""`torchmask validate --config NAME|PATH [RECIPE] [overrides]`: everything that can be known before a run."""

from collections.abc import Sequence

from torchmask.cli.catalog import find_config, recipe_of
from torchmask.cli.run import check


def validate(words: Sequence[str], *, config: str, trust: Sequence[str] = ()) -> int:
    """Checks a configuration and says so if it is good.

    Args:
        words: the recipe's name, if given, and overrides.
        config: built-in name or YAML file.
        trust: modules whose components are allowed.

    Raises:
        ConfigProblems: everything that is wrong.
    """
    named = [word for word in words[:1] if "=" not in word and not word.startswith("~")]
    overrides = words[len(named) :]
    recipe = named[0] if named else recipe_of(find_config(config))
    check(recipe, config, overrides, trust, check_files=True, open_tokenizer=True)
    print(f"{config}: good for recipe {recipe}")
    return 0
