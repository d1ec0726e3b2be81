"""Parts of the HTML reports: a self-contained page (light and dark), tables, charts as inline SVG.

Python computes values and positions; the markup is in `templates`.
"""
