"""The report page: one HTML file with its styles, script, data and plots inside, which needs no network."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fp4.checkpoint.io.publish import write_text
from fp4.quality.report_data import Report, gather, median_error
from fp4.quality.report_plots import error_by_depth, error_by_kind, size_bar

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5a6570; --line: #d5dae0; --back: #ffffff; --mark: #fff3d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #3a424b; --back: #14181c; --mark: #3d3214; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p.soft, .soft { color: var(--soft); } code { font-size: .9em; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; max-width: 60rem; display: block; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .25rem .7rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; font-variant-numeric: tabular-nums; }
td.number, th.number { text-align: right; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; } tr.bad td { background: var(--mark); }
input { font: inherit; padding: .3rem .5rem; width: 22rem; max-width: 100%; } .scroll { overflow-x: auto; }
ul { padding-left: 1.2rem; }
"""

# Sorts, filters and shows the table of layers; the rows are in the element with id "rows".
_SCRIPT = """
const data = JSON.parse(document.getElementById("rows").textContent);
const table = document.getElementById("layers"), heads = [...table.tHead.rows[0].cells];
const filter = document.getElementById("filter"), more = document.getElementById("more");
let column = data.sorted, descending = true, limit = 100;
function show() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const rows = data.rows.filter(r => words.every(w => r.text.includes(w)));
  rows.sort((a, b) => {
    const x = a.keys[column], y = b.keys[column];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
  });
  const body = document.createElement("tbody");
  for (const row of rows.slice(0, limit)) {
    const line = body.insertRow();
    if (row.bad) line.className = "bad";
    row.cells.forEach((text, i) => {
      const cell = line.insertCell();
      cell.textContent = text;
      cell.className = heads[i].className;
    });
  }
  table.replaceChild(body, table.tBodies[0]);
  heads.forEach((h, i) => h.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending"));
  more.hidden = rows.length <= limit;
  more.textContent = `show all ${rows.length}`;
}
heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
  descending = i === column ? !descending : heads[i].className === "number";
  column = i;
  show();
}));
filter.addEventListener("input", show);
more.addEventListener("click", () => { limit = Infinity; show(); });
show();
"""

# Columns of the table of layers: key, title, how a value is written.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("name", "layer", ""),
    ("scheme", "scheme", ""),
    ("shape", "shape", ""),
    ("output_error", "output error", "%"),
    ("weight_error", "weight error", "%"),
    ("weight_snr_db", "weight SNR, dB", ".1f"),
    ("zero", "zero", "%"),
    ("clipped", "clipped", "%"),
    ("bits_per_weight", "bits per weight", ".2f"),
    ("scale_rule", "scale rule", ""),
    ("seconds", "seconds", ".1f"),
)


def write_report(model: str | Path, output: Path, **options: Any) -> Report:
    """Write the report page of ``model`` to ``output``, with the options and errors of :func:`gather`."""
    report = gather(model, **options)
    write_text(output, page(report))
    return report


def page(report: Report) -> str:
    """The report as an HTML page."""
    title = html.escape(report.model)
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="soft">{html.escape(_subtitle(report))}</p>',
        _section("Which layers hurt", _list(verdict(report))),
        _section("Quality", _quality(report)),
        _section("Error along the depth", error_by_depth(report)),
        _section("Error by kind of layer", error_by_kind(report)),
        _section("All layers", _layers(report)),
        _section("Size", size_bar(report)),
        _section("Not quantized", _kept(report)),
        _section("How it was made", _pairs(report.facts)),
        _section("Notes", _list(report.notes)),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}: quantization report</title>\n"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def verdict(report: Report) -> list[str]:
    """Conclusions from the report's numbers, in sentences."""
    ranked = report.worst(len(report.layers))
    if not ranked:
        return []
    key = report.measured
    what = "output" if key == "output_error" else "weight"
    middle, worst = median_error(ranked, key), ranked[0]
    found = [
        f"Quantization changes the {what} of the median layer by {middle:.1%} and that of the worst, {worst['name']}, "
        f"by {worst[key]:.1%} (root mean square, relative)."
    ]
    kinds = report.by_kind()
    if len(kinds) > 1:
        names = list(kinds)
        first, last = (f"{name} ({median_error(kinds[name], key):.1%})" for name in (names[0], names[-1]))
        found.append(f"By kind {first} loses most and {last} least, by their medians.")
    bad = [layer for layer in ranked if _is_bad(layer, key, middle)]
    if bad:
        named = ", ".join(layer["name"] for layer in bad[:8]) + (" ..." if len(bad) > 8 else "")
        found.append(
            f"{len(bad)} {'layers lose' if len(bad) > 1 else 'layer loses'} more than twice the median: {named}. "
            "To keep them unquantized is the first thing to try where quality matters more than size."
        )
    else:
        found.append("No layer loses more than twice the median: no single layer is to blame.")
    return found


def _is_bad(layer: dict[str, Any], key: str, middle: float) -> bool:
    return layer[key] is not None and layer[key] > 2 * middle > 0


def _subtitle(report: Report) -> str:
    counts = Counter(layer["scheme"] for layer in report.layers)
    layers = ", ".join(f"{count} layers in {scheme}" for scheme, count in counts.items())
    size = sum(report.sizes.values())
    return ", ".join(part for part in (layers, f"{size / 1e6:,.1f} MB" if size else "") if part)


def _quality(report: Report) -> str:
    found = report.evaluation
    if found is None:
        return ""
    rows = {"perplexity": f"{found['perplexity']:.4g}"}
    comparison = found.get("comparison")
    if comparison:
        change = found["perplexity"] / comparison["original_perplexity"] - 1
        rows = {
            "perplexity": f"{found['perplexity']:.4g} ({change:+.1%})",
            "of the original": f"{comparison['original_perplexity']:.4g}",
            "KL divergence, mean (nats)": f"{comparison['kl_mean']:.4g}",
            "KL divergence, 99th percentile": f"{comparison['kl_p99']:.4g}",
            "same most likely token": f"{comparison['top1_agreement']:.1%}",
        }
    runs = "; ".join(f"{count} layers: {how}" for how, count in (found.get("runs") or {}).items())
    on = f"{found.get('windows')} windows of {found.get('window')} tokens of {(found.get('data') or {}).get('name')}"
    return _pairs(rows) + f'<p class="soft">{html.escape(f"{on}. {runs}")}</p>'


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    columns = [column for column in _COLUMNS if any(layer[column[0]] not in (None, "", []) for layer in report.layers)]
    ranked = report.worst(len(report.layers))
    middle = median_error(ranked, report.measured) if ranked else 0.0
    rows = []
    for layer in report.layers:
        cells = [_written(layer[key], style) for key, _, style in columns]
        keys = [_sort_key(layer[key]) for key, _, _ in columns]
        text = " ".join((layer["name"], layer["scheme"], layer["scale_rule"])).lower()
        rows.append({"cells": cells, "keys": keys, "text": text, "bad": _is_bad(layer, report.measured, middle)})
    heads = "".join(
        f'<th{" class=number" if style or key == "shape" else ""} scope="col"><button>{title}</button></th>'
        for key, title, style in columns
    )
    order = [key for key, _, _ in columns]
    data = {"rows": rows, "sorted": order.index(report.measured) if report.measured in order else 0}
    # A layer's name could contain `</script`, which would end the element.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<p><label>Filter <input id="filter" placeholder="down_proj, layers.3 ..."></label> '
        '<span class="soft">Click a title to sort. Marked: more than twice the median error.</span></p>'
        f'<div class="scroll"><table id="layers"><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>'
        '<p><button id="more" hidden></button></p>'
        f'<script type="application/json" id="rows">{embedded}</script>'
    )


def _written(value: Any, style: str) -> str:
    if value is None:
        return ""
    if style == "%":
        return f"{value:.2%}"
    if style:
        return f"{value:{style}}"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sort_key(value: Any) -> Any:
    if isinstance(value, list):
        count = 1
        for size in value:
            count *= size
        return count
    # Numbers in names are padded to one length, so that block 2 comes before block 10.
    return re.sub(r"\d+", lambda m: m[0].zfill(6), value) if isinstance(value, str) else value


def _kept(report: Report) -> str:
    alike: Counter[str] = Counter()
    for row in report.kept:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"])
        reason = f": {row['reason']}" if row["reason"] else ""
        alike[f"{name} ({row['dtype']} {' x '.join(map(str, row['shape']))}){reason}"] += 1
    return _list(name if count == 1 else f"{count} x {name}" for name, count in alike.items())


def _section(title: str, body: str | None) -> str:
    return f"<h2>{title}</h2>\n{body}" if body else ""


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _pairs(pairs: dict[str, str]) -> str:
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in pairs.items())
    return f"<table>{rows}</table>" if rows else ""
