from __future__ import annotations

project = "softsgx"
author = "the softsgx developers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.extlinks",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "softsgx"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
napoleon_custom_sections = [("Source", "returns_style")]
autodoc_typehints = "description"
nitpicky = False
