"""What the HTML reports share: one self-contained page in light and dark, tables, charts as inline SVG.

Python computes what is shown and where; the markup is in `templates`.
"""
