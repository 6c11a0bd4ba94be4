"""Sphinx reads this: ``sphinx-build docs build/docs``."""

from tikmix_fast import __version__

project = "tikmix_fast"
author = "The tikmix_fast developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 2
exclude_patterns = ["build"]
autodoc_typehints = "none"  # the docstrings say it in words
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
# A role without a name, as in `matrix`, is code.
default_role = "code"
