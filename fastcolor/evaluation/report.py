"""An evaluation as one HTML file that needs nothing else: tables, curves and pictures."""

from __future__ import annotations

import base64
from html import escape

from fastcolor.evaluation.chart import Line, line_chart
from fastcolor.evaluation.compare import GREY, MEAN, Evaluation, Shown

_COLORS = 6  # of models' lines

_STYLE = """
:root { color-scheme: light dark; --text: #1c1d21; --soft: #6b6e76; --line: #dcdee3; --page: #fff; --band: #f5f6f8;
  --c0: #0b62c4; --c1: #c4460b; --c2: #0a7d55; --c3: #8a3fb0; --c4: #a57c00; --c5: #b3225f; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e9ec; --soft: #9a9da6; --line: #363941; --page: #16171a;
  --band: #1f2126; --c0: #6fb1ff; --c1: #ff9d6b; --c2: #55d3a4; --c3: #cf9bec; --c4: #e3c053; --c5: #ff86b4; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: var(--text);
  background: var(--page); margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 2px } h2 { font-size: 19px; margin: 44px 0 10px }
p { margin: 6px 0; max-width: 76ch } .soft, figcaption { color: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; vertical-align: bottom; white-space: normal; line-height: 1.25 }
th:first-child, td:first-child { text-align: left }
tr.base td { color: var(--soft) } tr.shown td { background: var(--band); font-weight: 600 } td small { color: var(--soft); font-weight: 400 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 28px 32px }
figure { margin: 0 } .charts figcaption { font-size: 13px } figcaption b { color: var(--text) }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font-size: 11.5px } .mark { font-size: 10.5px }
.grid { stroke: var(--line); stroke-width: 1; fill: none } .axis { stroke: var(--soft); stroke-width: 1; fill: none }
.line { fill: none; stroke-width: 2; stroke: currentColor } .dot { fill: currentColor } .dashed { stroke-dasharray: 5 4; stroke-width: 1.5 }
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) } .c3 { color: var(--c3) } .c4 { color: var(--c4) }
.c5 { color: var(--c5) } .ck { color: var(--text) } .cs { color: var(--soft) }
.legend { list-style: none; margin: 4px 0 6px 52px; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px }
.legend li { display: flex; align-items: center; gap: 7px } .legend svg { width: 22px; height: 8px; flex: none }
.sheet { columns: 480px 2; column-gap: 24px } .sheet figure { break-inside: avoid; margin-bottom: 20px } .sheet.wide { columns: 1 }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 4px } .row img { width: 100%; display: block; border-radius: 3px }
.row span { font-size: 12px; color: var(--soft); display: block; margin-top: 2px } .sheet figcaption { font-size: 12px; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 14px } dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere } details { margin-top: 10px } summary { cursor: pointer }
@media (max-width: 620px) { .charts { grid-template-columns: 1fr } }
"""  # noqa: E501


def html(evaluation: Evaluation) -> str:
    """The whole page."""
    record = evaluation.record
    protocol = record["protocol"]
    names = ", ".join(m["name"] for m in protocol["models"])
    without = "" if any(r["field"] for r in evaluation.rows) else "; colours without the mean field"
    short = protocol["short_side"]
    sides = f"{short['least']}" if short["least"] == short["most"] else f"{short['least']} to {short['most']}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>fastcolor eval: {escape(names)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(names)}</h1>",
        f"<p class=soft>{protocol['pictures']} pictures of {escape(protocol['data'])}, short side {sides} pixels, "
        f"8 bits, whole{without}; {protocol['date']}, fastcolor {protocol['versions']['fastcolor']}</p>",
        _table(evaluation),
        "<p class=soft>A greyer picture has the better PSNR, so no figure stands for itself: compare rows of like "
        "colourfulness, and each with grey. ± is the standard error over pictures; cross-entropy (nats) and "
        "calibration error (ECE) are of the network, before the field; the oracle's cross-entropy is the least "
        "possible. "
        "LPIPS and FID: not computed, no weights at hand.</p>",
        "<h2>Curves</h2><div class=charts>",
        _psnr_curve(evaluation),
        _accuracy_curve(evaluation, "ab_accuracy", "AuC"),
        _accuracy_curve(evaluation, "ab_accuracy_rebalanced", "Rebalanced AuC"),
        _reliability_curve(evaluation),
        "</div>",
    ]
    for title, text, shown in (
        ("Drawn by chance", "What to expect.", evaluation.chance),
        ("Best by PSNR", "Of the first model.", evaluation.best),
        ("Worst by PSNR", "Of the first model. What lightness does not tell is not guessed.", evaluation.worst),
    ):
        if shown:
            parts.append(f"<h2>{title}</h2><p class=soft>{text}</p>{_sheet(shown)}")
    parts.append(_protocol(record))
    return "\n".join(part for part in parts if part) + "\n"


def _shown(evaluation: Evaluation) -> dict[str, float | None]:
    """For each model the vividness that pictures and curves are of: the one nearest to the default."""
    return {m["name"]: m["shown_vividness"] for m in evaluation.record["protocol"]["models"]}


def _shown_rows(evaluation: Evaluation) -> list[dict]:
    shown = _shown(evaluation)
    return [r for r in evaluation.rows if not r["baseline"] and r["vividness"] == shown[r["name"]]]


def _table(evaluation: Evaluation) -> str:
    heads = ("", "vividness", "PSNR dB", "above grey", "SSIM", "ΔE2000", "colour&shy;fulness", "AuC", "re&shy;balanced",
             "cross-entropy", "ECE")  # fmt: skip
    lines = []
    shown = [id(r) for r in _shown_rows(evaluation)]
    for r in evaluation.rows:
        gain = f"{r['psnr_gain']:+.2f}".replace("-", "−")
        if r["psnr_gain_error"] is not None:
            gain += f" <small>± {r['psnr_gain_error']:.2f}</small>"
        cells = (
            escape(r["name"]),
            _format(r["vividness"], "{:g}"),
            f"{r['psnr']:.2f}",
            "" if r["name"] == GREY else gain,
            f"{r['ssim']:.3f}",
            f"{r['delta_e_2000']:.2f}",
            _format(r["colorfulness_ratio"], "{:.0%}"),
            f"{r['auc']:.1%}",
            _format(r["auc_rebalanced"], "{:.1%}"),
            _format(r["bin_cross_entropy"], "{:.2f}"),
            _format(r["calibration_error"], "{:.3f}"),
        )
        kind = "base" if r["baseline"] else "shown" if id(r) in shown else ""
        lines.append(f"<tr class='{kind}'>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _figure(svg: str, title: str, text: str) -> str:
    return f"<figure>{svg}<figcaption><b>{title}</b> {text}</figcaption></figure>"


def _psnr_curve(evaluation: Evaluation) -> str:
    models = list(_shown(evaluation))
    lines = []
    for k, name in enumerate(models):
        rows = [r for r in evaluation.rows if r["name"] == name and not r["baseline"]]
        points = [(r["colorfulness_ratio"] or 0.0, r["psnr"]) for r in rows]
        marks = [_format(r["vividness"], "{:g}") for r in rows]
        lines.append(Line(name, points, k % _COLORS, marks=marks))
    # the oracle lies far above, and would flatten the rest
    for row in evaluation.rows:
        if row["name"] in (GREY, MEAN):
            lines.append(Line(row["name"], [(row["colorfulness_ratio"] or 0.0, row["psnr"])],
                              "k" if row["name"] == GREY else "s", marks=[""]))  # fmt: skip
    svg = line_chart(lines, "colourfulness, share of the truth's", "PSNR, dB", percent=(True, False))
    return _figure(svg, "PSNR over colourfulness.", "Numbers are the vividness. Up and to the right is better.")


def _accuracy_curve(evaluation: Evaluation, key: str, title: str) -> str:
    rows = [(r, k % _COLORS, False) for k, r in enumerate(_shown_rows(evaluation))]
    rows += [(r, {GREY: "k", MEAN: "s"}[r["name"]], True) for r in evaluation.rows if r["name"] in (GREY, MEAN)]
    rows = [(r, color, dashed) for r, color, dashed in rows if r[key] is not None]
    if not rows:
        return ""
    area = {"ab_accuracy": "auc", "ab_accuracy_rebalanced": "auc_rebalanced"}[key]
    lines = [Line(f"{r['name']}, {r[area]:.1%}", list(enumerate(r[key])), color, dashed) for r, color, dashed in rows]
    svg = line_chart(lines, "ab error, Lab units", "share of pixels within it", (0, 100), (0, 1), (False, True))
    weigh = "each pixel alike" if key == "ab_accuracy" else "each pixel by the inverse probability of its true colour"
    return _figure(svg, f"{title}.", f"{weigh.capitalize()}. The area is taken over 0 to 150.")


def _reliability_curve(evaluation: Evaluation) -> str:
    lines = [Line("perfect", [(0, 0), (1, 1)], "s", True)]
    for k, r in enumerate(_shown_rows(evaluation)):
        for key, ece, after in (
            ("reliability", "calibration_error", ""),
            ("reliability_field", "calibration_error_field", ", after the field"),
        ):
            if r[key] is None:
                continue
            count, confidence, right = r[key]
            # an interval with few pixels is noise
            least = max(20, 2e-4 * sum(count))
            found = zip(count, confidence, right, strict=True)
            points = [(c / n, y / n) for n, c, y in found if n >= least]
            name = f"{r['name']}{after}, ECE {r[ece]:.3f}"
            lines.append(Line(name, points, k % _COLORS, bool(after), [""] * len(points)))
    if len(lines) == 1:
        return ""
    svg = line_chart(lines, "probability of the likeliest label", "how often it is the true one", (0, 1), (0, 1),
                     (True, True))  # fmt: skip
    return _figure(svg, "Calibration.", "Of the distribution over labels, vividness included. Below the line is "
                   "overconfident.")  # fmt: skip


def _sheet(shown: list[Shown]) -> str:
    wide = " wide" if len(shown[0].pictures) > 4 else ""
    figures = []
    for s in shown:
        values = [f"{v:.2f} dB" for v in s.psnr] + [""]
        cells = "".join(
            f"<div><img src='data:image/jpeg;base64,{base64.b64encode(picture).decode()}' alt=''>"
            f"<span>{escape(caption)} {value}</span></div>"
            for picture, caption, value in zip(s.pictures, s.captions, values, strict=True)
        )
        figures.append(f"<figure><div class=row>{cells}</div><figcaption>{escape(s.name)}</figcaption></figure>")
    return f"<div class='sheet{wide}'>{''.join(figures)}</div>"


def _protocol(record: dict) -> str:
    lines = []
    for name, value in record["protocol"].items():
        if name == "models":
            continue
        lines.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_words(value))}</dd>")
    for m in record["protocol"]["models"]:
        lines.append(
            f"<dt>{escape(m['name'])}</dt><dd>{escape(_words({k: v for k, v in m.items() if k != 'name'}))}</dd>"
        )
    left_out = record["left_out"]
    counts = ", ".join(f"{n} {kind}" for kind, n in left_out["counts"].items()) or "none"
    reasons = [why if name in why else f"{name}: {why}" for name, why in left_out["files"].items()]
    files = "".join(f"<li>{escape(why)}</li>" for why in reasons)
    details = f"<details><summary>Pictures left out: {counts}</summary><ul>{files}</ul></details>"
    details = details if files else "<p>Pictures left out: none.</p>"
    return f"<h2>Protocol</h2><dl>{''.join(lines)}</dl>{details}"


def _words(value) -> str:
    """A value of the record as a reader likes it."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(v) for v in value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
