"""Sphinx settings; build with ``make docs``."""

import re
from importlib.metadata import version as installed_version
from pathlib import Path

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


def show_tutorial(app, docname, source):
    """Put a tutorial's cells where a page says ``{tutorial}`name```, with those of its figures that are kept here."""
    here = Path(app.srcdir)
    for name in re.findall(r"^{tutorial}`(\w+)`$", source[0], flags=re.MULTILINE):
        path = here.parent / "tutorials" / f"{name}.py"
        app.env.note_dependency(str(path))
        cells = re.split(r"^# %%(.*)$", path.read_text(), flags=re.MULTILINE)[1:]
        shown = [show_cell(kind, cell.strip(), name, here) for kind, cell in zip(cells[::2], cells[1::2], strict=True)]
        source[0] = source[0].replace(f"{{tutorial}}`{name}`", "\n\n".join(shown))


def show_cell(kind, cell, name, here):
    """Return a cell as Markdown, code followed by those figures it saves that are kept in docs/figures."""
    if "[markdown]" in kind:
        return re.sub(r"^# ?", "", cell, flags=re.MULTILINE)
    saved = re.findall(r"^save\(.*\"(\w+)\"\)$", cell, flags=re.MULTILINE)
    files = [f"figures/{name.split('_')[0]}_{figure}.png" for figure in saved]
    pictures = [f"![{Path(file).stem}]({file})" for file in files if (here / file).exists()]
    return "\n\n".join([f"```python\n{cell}\n```", *pictures])


def setup(app):
    app.connect("source-read", show_tutorial)
    app.connect("autodoc-process-docstring", escape_shapes)
