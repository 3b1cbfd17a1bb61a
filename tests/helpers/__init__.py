"""What several test files share."""

import pkgutil

import pytest

# so that a failed assert in them shows its values, as one in a test does
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
