"""An evaluation as one HTML file that needs nothing else: tables, curves and pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape

from fastcolor.evaluation.chart import Line, line_chart
from fastcolor.evaluation.compare import GREY, MEAN, Evaluation, Shown, fid_note
from fastcolor.evaluation.films import ALONE_WORDS, TRUTH, FilmEvaluation

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
h3 { font-size: 16px; margin: 32px 0 4px }
p { margin: 6px 0; max-width: 76ch } .soft, figcaption { color: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; vertical-align: bottom; white-space: normal; line-height: 1.25 }
th:first-child, td:first-child { text-align: left }
tr.base td { color: var(--soft) } tr.shown td { background: var(--band); font-weight: 600 } td small { color: var(--soft); font-weight: 400 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 28px 32px }
.charts.one { grid-template-columns: minmax(0, 560px) }
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


def html(photos: Evaluation | None, films: FilmEvaluation | None = None) -> str:
    """The whole page, of photos, films or both."""
    protocol = (photos or films).record["protocol"]
    names = ", ".join(m["name"] for m in protocol["models"])
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>fastcolor eval: {escape(names)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(names)}</h1>",
        *(_photos(photos) if photos else ()),
        *(_films(films) if films else ()),
        "<h2>Protocol</h2>",
    ]
    if photos:
        parts.append(_protocol(photos.record, "Pictures"))
    if films:
        parts.append(("<h3>Films</h3>" if photos else "") + _protocol(films.record, "Films"))
    return "\n".join(part for part in parts if part) + "\n"


def _made(protocol: dict) -> str:
    return f"{protocol['date']}, fastcolor {protocol['versions']['fastcolor']}"


def _photos(evaluation: Evaluation) -> Iterator[str]:
    record = evaluation.record
    protocol, short = record["protocol"], record["protocol"]["short_side"]
    without = "" if any(r["field"] for r in evaluation.rows) else "; colours without the mean field"
    sides = f"{short['least']}" if short["least"] == short["most"] else f"{short['least']} to {short['most']}"
    yield (
        f"<p class=soft>{protocol['pictures']} pictures of {escape(protocol['data'])}, short side {sides} pixels, "
        f"8 bits, whole{without}; {_made(protocol)}</p>"
    )
    yield _table(evaluation)
    notes = [fid_note(record), *(f"{name.upper()}: {why}" for name, why in record["not_computed"].items())]
    missing = " ".join(f"{note}." for note in notes if note)
    yield (
        "<p class=soft>A greyer picture has the better PSNR, so no figure stands for itself: compare rows of like "
        "colourfulness, and each with grey. ± is the standard error over pictures; cross-entropy (nats) and "
        "calibration error (ECE) are of the network, before the field; the oracle's cross-entropy is the least "
        f"possible. {escape(missing)}</p>"
    )
    yield "<h2>Curves</h2><div class=charts>"
    yield _psnr_curve(evaluation.rows, list(_shown(evaluation)))
    yield _accuracy_curve(evaluation, "ab_accuracy", "AuC")
    yield _accuracy_curve(evaluation, "ab_accuracy_rebalanced", "Rebalanced AuC")
    yield _reliability_curve(evaluation)
    yield "</div>"
    for title, text, shown in (
        ("Drawn by chance", "What to expect.", evaluation.chance),
        ("Best by PSNR", "Of the first model.", evaluation.best),
        ("Worst by PSNR", "Of the first model. What lightness does not tell is not guessed.", evaluation.worst),
    ):
        if shown:
            yield f"<h2>{title}</h2><p class=soft>{text}</p>{_sheet(shown)}"


def _shown(evaluation: Evaluation | FilmEvaluation) -> dict[str, float | None]:
    """For each model the vividness that pictures and curves are of: the one nearest to the default."""
    return {m["name"]: m["shown_vividness"] for m in evaluation.record["protocol"]["models"]}


def _shown_rows(evaluation: Evaluation) -> list[dict]:
    shown = _shown(evaluation)
    return [r for r in evaluation.rows if not r["baseline"] and r["vividness"] == shown[r["name"]]]


def _table(evaluation: Evaluation) -> str:
    heads = ("", "vividness", "PSNR dB", "above grey", "SSIM", "ΔE2000", "colour&shy;fulness", "AuC", "re&shy;balanced",
             "cross-entropy", "ECE")  # fmt: skip
    more = [name for name in ("lpips", "fid") if name in evaluation.record["protocol"]]
    lines = []
    shown = [id(r) for r in _shown_rows(evaluation)]
    for r in evaluation.rows:
        cells = (
            escape(r["name"]),
            _format(r["vividness"], "{:g}"),
            f"{r['psnr']:.2f}",
            _gain(r),
            f"{r['ssim']:.3f}",
            f"{r['delta_e_2000']:.2f}",
            _format(r["colorfulness_ratio"], "{:.0%}"),
            f"{r['auc']:.1%}",
            _format(r["auc_rebalanced"], "{:.1%}"),
            _format(r["bin_cross_entropy"], "{:.2f}"),
            _format(r["calibration_error"], "{:.3f}"),
            *(_format(r[name], "{:.3f}" if name == "lpips" else "{:.2f}") for name in more),
        )
        lines.append(_row(r, cells, id(r) in shown))
    return _whole_table((*heads, *map(str.upper, more)), lines)


def _gain(row: dict) -> str:
    if row["name"] == GREY or row["psnr_gain"] is None:
        return ""
    gain = f"{row['psnr_gain']:+.2f}".replace("-", "−")
    return gain + ("" if row["psnr_gain_error"] is None else f" <small>± {row['psnr_gain_error']:.2f}</small>")


def _row(row: dict, cells: Sequence[str], shown: bool) -> str:
    kind = "base" if row["baseline"] else "shown" if shown else ""
    return f"<tr class='{kind}'>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _whole_table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _figure(svg: str, title: str, text: str) -> str:
    return f"<figure>{svg}<figcaption><b>{title}</b> {text}</figcaption></figure>"


def _color_curve(rows: list[dict], models: list[str], key: str, label: str, alone: bool = False) -> str:
    """A figure over colourfulness: a line for each model with a dot for each vividness, and dots of baselines; `alone`
    puts those of frames by themselves in too."""
    rows = [r for r in rows if r[key] is not None]

    def place(row: dict) -> tuple[float, float]:
        return row["colorfulness_ratio"] or 0.0, row[key]

    lines = []
    for k, name in enumerate(models):
        of_model = [r for r in rows if r["name"] == name and not r["baseline"]]
        marks = [_format(r["vividness"], "{:g}") for r in of_model]
        lines.append(Line(name, [place(r) for r in of_model], k % _COLORS, marks=marks))
        if alone:
            single = [r for r in rows if r["name"] == f"{name}, {ALONE_WORDS}"]
            lines += [Line(r["name"], [place(r)], k % _COLORS, True, ["alone"]) for r in single]
    # the oracle lies far above, and would flatten the rest
    for row in rows:
        if row["name"] in (GREY, MEAN):
            lines.append(Line(row["name"], [place(row)], "k" if row["name"] == GREY else "s", marks=[""]))
    return line_chart(lines, "colourfulness, share of the truth's", label, percent=(True, False))


def _psnr_curve(rows: list[dict], models: list[str]) -> str:
    svg = _color_curve(rows, models, "psnr", "PSNR, dB")
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


def _sheet(shown: list[Shown], wide: bool = False) -> str:
    wide = " wide" if wide or len(shown[0].pictures) > 4 else ""
    figures = []
    for s in shown:
        values = [f"{v:.2f} dB" for v in s.psnr] + [""]
        captions = [f"{caption} {value}" for caption, value in zip(s.captions, values, strict=True)]
        figures.append(_pictures(s.pictures, captions, s.name))
    return f"<div class='sheet{wide}'>{''.join(figures)}</div>"


def _pictures(pictures: list[bytes], captions: list[str], text: str) -> str:
    cells = "".join(
        f"<div><img src='data:image/jpeg;base64,{base64.b64encode(picture).decode()}' alt=''>"
        f"<span>{escape(caption)}</span></div>"
        for picture, caption in zip(pictures, captions, strict=True)
    )
    return f"<figure><div class=row>{cells}</div><figcaption>{escape(text)}</figcaption></figure>"


# --- films ------------------------------------------------------------------------------------------------------------


def _films(evaluation: FilmEvaluation) -> Iterator[str]:
    record, protocol = evaluation.record, evaluation.record["protocol"]
    films, most = record["films"], protocol["seconds_of_each_at_most"]
    what = films[0]["name"] if len(films) == 1 else f"{len(films)} films of {protocol['data']}"
    start = f" from {protocol['start_of_each']:g} s on" if protocol["start_of_each"] else ""
    start += "" if most is None else f", {most:g} s of each at most"
    mean = "; means over films" if len(films) > 1 else ""
    yield "<h2>Films</h2>"
    yield (f"<p class=soft>{escape(what)}, {protocol['frames']} frames{start}{mean}; {_made(protocol)}</p>")
    models = list(_shown(evaluation))
    yield _film_table(evaluation.rows, _shown(evaluation))
    yield (
        "<p class=soft>Flicker is the change of colour from frame to frame where lightness stands still, in Lab units; "
        "CDC (TCVC) the change of the histograms of R, G and B, most of which is lightness. Grey is calmest: compare "
        "rows of like colourfulness. A ratio below 1 is calmer than the film itself, whose noise and compression "
        "flicker too.</p>"
    )
    yield "<div class=charts>"
    yield _psnr_curve(evaluation.rows, models)
    if any(r["flicker_ratio"] is not None for r in evaluation.rows):
        svg = _color_curve(evaluation.rows, models, "flicker_ratio", "flicker ÷ that of the truth", alone=True)
        yield _figure(svg, "Flicker over colourfulness.", "Numbers are the vividness; alone: each frame by itself. "
                      "Down and to the right is better.")  # fmt: skip
    yield "</div>"
    albums = {shown.name: shown for shown in evaluation.shown}
    for film in films:
        size = f"{film['width']}×{film['height']}, {film['frames']} frames, {film['frames_per_second']:g} a second"
        early = f"; only so many: {film['ended_early']}" if film["ended_early"] else ""
        yield f"<h3>{escape(film['name'])}</h3><p class=soft>{size}{escape(early)}</p>"
        if len(films) > 1:
            yield _film_table(film["rows"], _shown(evaluation))
        album = albums.get(film["name"])
        if album is not None:
            yield _sheet(album.stills, wide=True) if album.stills else ""
            text = "The chroma of the middle row of pixels through time, downwards, × 1.5 at one lightness: bands that "
            text += "run across are flicker."
            yield f"<div class='sheet wide'>{_pictures(album.slices, album.captions, text)}</div>"
        yield f"<div class='charts one'>{_flicker_in_time(film, _shown(evaluation))}</div>"


def _film_table(rows: list[dict], shown: dict[str, float | None]) -> str:
    heads = ("", "vividness", "PSNR dB", "above grey", "colour&shy;fulness", "flicker", "÷ truth", "CDC · 10⁴",
             "÷ truth")  # fmt: skip
    lines = []
    for r in rows:
        cells = (
            escape(r["name"]), _format(r["vividness"], "{:g}"), _format(r["psnr"], "{:.2f}"),
            _gain({"psnr_gain_error": None, **r}), _format(r["colorfulness_ratio"], "{:.0%}"),
            _format(r["flicker"], "{:.3f}"), _format(r["flicker_ratio"], "{:.2f}"),
            _format(None if r["cdc"] is None else 1e4 * r["cdc"], "{:.2f}"), _format(r["cdc_ratio"], "{:.2f}"),
        )  # fmt: skip
        lines.append(_row(r, cells, not r["baseline"] and r["name"] in shown and r["vividness"] == shown[r["name"]]))
    return _whole_table(heads, lines)


def _flicker_in_time(film: dict, shown: dict[str, float | None]) -> str:
    lines = []
    for r in film["rows"]:
        name = r["name"].removesuffix(f", {ALONE_WORDS}")
        if r["name"] == TRUTH or (name in shown and r["vividness"] == shown[name]):
            steps = enumerate(r["flicker_of_frames"], 1)
            points = [(t / film["frames_per_second"], value) for t, value in steps if value is not None]
            color = "k" if r["name"] == TRUTH else list(shown).index(name) % _COLORS
            lines.append(Line(r["name"], points, color, r["each_frame_alone"]))
    if not any(line.points for line in lines):
        return ""
    return _figure(line_chart(lines, "seconds", "flicker, Lab units a frame"), "Flicker through time.",
                   "Peaks are frames whose colours jump.")  # fmt: skip


# --- protocol ---------------------------------------------------------------------------------------------------------


def _protocol(record: dict, what: str) -> str:
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
    details = f"<details><summary>{what} left out: {counts}</summary><ul>{files}</ul></details>"
    details = details if files else f"<p>{what} left out: none.</p>"
    return f"<dl>{''.join(lines)}</dl>{details}"


def _words(value) -> str:
    """A value of the record as a reader likes it."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(v) for v in value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
