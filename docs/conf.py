"""Sphinx settings of the documentation site: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import edgelm

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "EdgeLM"
author = "EdgeLM authors"
copyright = "EdgeLM authors"  # noqa: A001  Sphinx's name
release = version = edgelm.__version__

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "cli_reference",
    "sphinx_copybutton",
]  # fmt: skip
# Quotes and hyphens are what one types.
smartquotes = False
html_theme = "furo"
html_title = f"EdgeLM {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# GitHub's anchors of headings, so that a link works in both places; tables of definitions.
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# `$ ` marks what to type; what follows is printed.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"
