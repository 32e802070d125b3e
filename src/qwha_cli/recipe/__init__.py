"""Recipes: the one file that says what a run shall do, parsed into a frozen object before anything heavy is imported."""
