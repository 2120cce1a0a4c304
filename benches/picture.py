"""Draws docs/kl.svg: KL divergences of both tools at each size of file, from the table in docs/benchmarks.md behind `<!-- picture -->`.

    python3 benches/picture.py

Needs nothing but Python. The picture has a ground of its own, and other colours where a reader prefers dark ones.
"""

import math
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARAMETERS = 134_515_008  # of SmolLM2-135M
WIDTH, LINE = 760, 32
LEFT, RIGHT, TOP, BOTTOM = 196, 24, 78, 58
ACROSS = (0.001, 0.3)
NAMES = ("llama-quantize", "quantc")

STYLE = """
.ground { fill: #ffffff } .grid { stroke: #e3e6ea } .text { fill: #24292f } .soft { fill: #57606a }
.p0 { fill: #b35900 } .p1 { fill: #0a62c9 } .tie { stroke: #8c959f; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
.ground { fill: #0d1117 } .grid { stroke: #2b323b } .text { fill: #e6edf3 } .soft { fill: #9ea7b3 }
.p0 { fill: #f0a050 } .p1 { fill: #6cb2ff } .tie { stroke: #6e7681 }
}
text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
"""


def rows():
    """Type, the bytes of both files and their KL divergences as written, of every row of the table."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    lines = iter(text.split("<!-- picture -->")[1].splitlines())
    for line in lines:
        if line.startswith("|---"):
            break
    for line in lines:
        if not line.startswith("|"):
            return
        cells = [cell.strip() for cell in line.split("|")]
        yield cells[1], [size.strip() for size in cells[2].split("/")], [cell.split()[0] for cell in cells[3:5]]


def bits(size):
    return int(size.replace(",", "")) * 8 / PARAMETERS


def x(value):
    low, high = (math.log(edge) for edge in ACROSS)
    return LEFT + (math.log(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def label(at_x, at_y, text, kind="text", anchor="start", more=""):
    return f'<text class="{kind}" x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}"{more}>{text}</text>'


def drawn():
    table = sorted(rows(), key=lambda row: bits(row[1][1]))
    bottom = TOP + LINE * len(table)
    height = bottom + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        label(16, 28, "What GGUF files of SmolLM2-135M lose"),
        label(16, 58, "type, bits per weight of the file", "soft"),
    ]
    for who, name in enumerate(NAMES):
        at = WIDTH - RIGHT - 270 + who * 160
        out.append(f'<circle class="p{who}" cx="{at}" cy="23" r="6"/>' + label(at + 12, 28, name))
    for value in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        out.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
        out.append(label(x(value), bottom + 20, value, "soft", "middle"))
    axis = "KL divergence from the original in nats, logarithmic; less is better"
    out.append(label((LEFT + WIDTH - RIGHT) / 2, bottom + 44, axis, "soft", "middle"))
    for index, (kind, sizes, losses) in enumerate(table):
        y = TOP + LINE * (index + 0.5)
        out.append(label(16, y + 5, kind) + label(LEFT - 22, y + 5, f"{bits(sizes[1]):.2f}", "soft", "end"))
        left, right = sorted(x(float(loss)) for loss in losses)
        out.append(f'<line class="tie" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>')
        for who, name in enumerate(NAMES):
            title = f"<title>{kind} by {name}: {sizes[who]} bytes, KL {losses[who]}</title>"
            # Where both are equal, the one below is still to be seen.
            radius = 6 if who or losses[0] != losses[1] else 9
            out.append(f'<circle class="p{who}" cx="{x(float(losses[who])):.1f}" cy="{y}" r="{radius}">{title}</circle>')
    return "\n".join(out + ["</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs/kl.svg").write_text(drawn())
