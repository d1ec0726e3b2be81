"""Draws chain.svg: how a checkpoint becomes a bundle, and how the device proves it.

python docs/figures/chain.py            write chain.svg
python docs/figures/chain.py --check    exit code 1 where chain.svg is not what this script draws
"""

from __future__ import annotations

import sys
from pathlib import Path

OUT = Path(__file__).parent / "chain.svg"
WIDTH, HEIGHT = 880, 268
INK, PALE, ACCENT, CARD = "#1f2937", "#6b7280", "#0f766e", "#ffffff"

# x, y, width, title, lines below it, and whether it is part of the proof.
BOXES = [
    (24, 52, 140, "Checkpoint", ("Hugging Face folder", "or hub id"), False),
    (212, 52, 140, "Quantise", ("int4, int8, fp8", "GPTQ, mixed bits"), False),
    (400, 52, 140, "Export", ("ONNX, TensorRT", "our own operators"), False),
    (616, 52, 112, "Bundle", ("graph, weights,", "tokenizer"), False),
    (756, 52, 100, "Tokens", ("run, chat,", "your app"), False),
    (212, 172, 140, "Reference", ("PyTorch, float32:", "logits, experts"), True),
    (400, 172, 140, "Parity pack", ("the reference's", "recorded results"), True),
    (616, 172, 240, "edgelm parity", ("same model here? if not:", "which layer, which expert"), True),
]
# Points of each arrow; the last one has the head.
ARROWS = [
    (((164, 84), (208, 84)), False),
    (((352, 84), (396, 84)), False),
    (((540, 84), (612, 84)), False),
    (((728, 84), (752, 84)), False),
    (((94, 116), (94, 204), (208, 204)), True),
    (((282, 116), (282, 168)), True),
    (((352, 204), (396, 204)), True),
    (((540, 204), (576, 204), (576, 104), (612, 104)), True),
    (((672, 116), (672, 168)), True),
]


def draw() -> str:
    """The picture as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">',
        "<title>A checkpoint is quantised and exported to a bundle. The reference's results travel in it, and "
        "edgelm parity compares them with what the device computes.</title>",
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
            for name, colour in (("plain", PALE), ("proof", ACCENT))
        ),
        "</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#f8fafc"/>',
        f'<rect x="590" y="14" width="280" height="240" rx="10" fill="none" stroke="{PALE}" stroke-dasharray="5 5"/>',
        f'<text x="606" y="36" font-size="13" fill="{PALE}">on the device: no PyTorch needed</text>',
        f'<text x="24" y="36" font-size="13" fill="{PALE}">where you export: needs no GPU</text>',
    ]
    for points, proof in ARROWS:
        path = " ".join(f"{x} {y}" for x, y in points)
        name, colour = ("proof", ACCENT) if proof else ("plain", PALE)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8" marker-end="url(#{name})"/>')
    for x, y, width, title, lines, proof in BOXES:
        colour = ACCENT if proof else INK
        middle = x + width / 2
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="64" rx="8" fill="{CARD}" stroke="{colour}"/>')
        parts.append(
            f'<text x="{middle:g}" y="{y + 21}" font-size="15" font-weight="600" text-anchor="middle" '
            f'fill="{colour}">{title}</text>'
        )
        for number, line in enumerate(lines):
            parts.append(
                f'<text x="{middle:g}" y="{y + 39 + 16 * number}" font-size="12.5" text-anchor="middle" '
                f'fill="{INK}">{line}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if not OUT.exists() or OUT.read_text(encoding="utf-8") != draw():
            sys.exit(f"{OUT.name} is not what this script draws: python docs/figures/chain.py")
    else:
        OUT.write_text(draw(), encoding="utf-8")
