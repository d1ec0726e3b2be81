"""What the HTML reports share: one self-contained page in light and dark, tables, charts as inline SVG."""
