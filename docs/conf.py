"""Sphinx settings; build with ``make docs``."""

import re
from importlib.metadata import version as installed_version

project = "pyro_voed"
author = "The pyro_voed developers"
copyright = author
release = version = installed_version("pyro_voed")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath"]

# The API pages are written from the docstrings, one for each module.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
# Signatures show shapes as they are written, e.g. Float[Tensor, "num_samples *batch"].
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Tensor": "Tensor"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types of attributes stand in their text already, and the star of a shape would start emphasis there.
napoleon_attr_annotations = False

# Single backticks in docstrings are code.
default_role = "code"

html_theme = "furo"
html_title = "pyro_voed"


def escape_shapes(app, what, name, obj, options, lines):
    """Keep the star of a shape such as (num_samples, *batch) from starting emphasis."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(?<![\\*\w`])\*(?=\w+[,)])", r"\\*", line)


def setup(app):
    app.connect("autodoc-process-docstring", escape_shapes)
