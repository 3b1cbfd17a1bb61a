"""Packages that not everything needs: whether one is there, and the command that brings it."""

import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

from .errors import InputError


def is_installed(package: str) -> bool:
    """Whether a package can be found; does not import it."""
    return importlib.util.find_spec(package) is not None


def install_command(package: str) -> str:
    """The command that installs a package, to be pasted into a shell."""
    if package == "visdom" and sys.version_info < (3, 12):  # see constraints.txt
        return 'pip install "setuptools<81" wheel "tornado<6.5" && pip install --no-build-isolation visdom'
    return f"pip install {package}"


def own_version() -> str:
    """The version of this package, "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("guided-diffusion-segmentation")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def missing(what: str, package: str) -> str:
    """That `what`, in the singular, needs a package which is not installed, and the command that installs it."""
    return f"{what} needs the package {package}: {install_command(package)}"


def require(package: str, what: str) -> ModuleType:
    """Import a package for what needs it.

    :param what: that which needs it, in the singular, as in "--visdom start"; for the message.
    :raises InputError: if it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if is_installed(package):
            raise InputError(f"{what} needs the package {package}, which cannot be imported ({error}); install it anew:"
                             f" {install_command(package)}") from error
        raise InputError(missing(what, package)) from None
