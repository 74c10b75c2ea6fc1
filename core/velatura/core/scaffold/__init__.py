"""`velatura new-plugin`: a package that installs, with a component of each kind asked for, and tests that pass."""

from velatura.core.scaffold.package import new_plugin

__all__ = ["new_plugin"]
