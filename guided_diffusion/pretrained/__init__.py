"""Weights that come with the package."""


def path_of(name_or_path: str) -> str:
    """The file of weights that this names."""
    return name_or_path
