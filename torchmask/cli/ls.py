"""`torchmask ls`: recipes, the configurations of each, and what each is for."""

from torchmask.cli.catalog import Entry, configs, recipes


def ls() -> int:
    """Prints the table."""
    every_config = configs()
    rows = [("RECIPE", "CONFIG", "WHAT IT DOES")]
    for recipe in recipes():
        rows.append((recipe.name, "", recipe.summary))
        own = [config for config in every_config if config.recipe == recipe.name]
        rows += [("", config.name, config.summary) for config in own]
    rows += [("-", config.name, config.summary) for config in _without_recipe(every_config)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for first, second, third in rows:
        print(f"{first:<{widths[0]}}  {second:<{widths[1]}}  {third}".rstrip())
    return 0


def _without_recipe(every_config: list[Entry]) -> list[Entry]:
    return [config for config in every_config if config.recipe is None]
