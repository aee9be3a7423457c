"""One self-contained HTML page: no script, no request, light and dark, wide and narrow.

Everything that is not already `Html` is escaped where it enters, so that no text of a run (a
sample, a name, a command) can become markup.
"""

from __future__ import annotations

import base64
import html
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.plots import COLOURS, FAINT, INK

MAX_FIGURE = 4_000_000  # bytes of one embedded picture
MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: str) -> Html:
    """An element; children that are not Html are escaped, None is left out. `class_` is class."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    if name in ("img", "meta"):
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children after one another, escaped unless they are Html."""
    return Html("".join(escape(child) for child in children if child is not None))


def escape(value: Any) -> str:
    """Html as it is; anything else as text that a browser shows literally."""
    return value if isinstance(value, Html) else html.escape(printable(str(value)))


def printable(text: str) -> str:
    """Without control and formatting characters, which could steer a terminal or reorder text."""
    text = ESCAPE_SEQUENCE.sub("", text.replace("\r\n", "\n"))
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in HIDDEN)


HIDDEN = ("Cc", "Cf", "Cs", "Co")
ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def shown(value: Any) -> str:
    """A value as a person reads it: 1,234,567; 2.173; yes; 'not finite' for null and nan."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "not finite"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1000:
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    return str(value)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str = "") -> Html:
    """A table that scrolls by itself where the screen is narrow."""
    head = tag("thead", tag("tr", *(tag("th", cell) for cell in header))) if header else None
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", head, body, class_=class_), class_="scroll")


def facts(values: Mapping[str, Any]) -> Html:
    """Names and values, nested mappings flattened with dots."""
    return table([], [(tag("code", key), shown(value)) for key, value in flat(values)], "facts")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def tile(name: str, value: str, class_: str = "") -> Html:
    """A number with its name above."""
    return tag("div", tag("span", name), tag("strong", value), class_=f"tile {class_}".strip())


def badge(text: str, kind: str) -> Html:
    """A coloured word: `kind` is good, fair, bad or none."""
    return tag("span", text, class_=f"badge {kind}")


def section(title: str, *parts: Any) -> Html:
    return tag("section", tag("h2", title), *parts)


def folded(title: str, *parts: Any) -> Html:
    return tag("details", tag("summary", title), *parts)


def chart(svg: str, caption: Any = None) -> Html:
    """An SVG of `plots`, inline, its colours those of the page."""
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    for colour, variable in COLOUR_VARIABLES.items():
        svg = re.sub(colour, f"var({variable})", svg, flags=re.IGNORECASE)
    return tag("figure", Html(svg), tag("figcaption", caption) if caption else None)


def pictures(folder: Path, pattern: str = "*") -> list[Html]:
    """The pictures of a folder, embedded. As images: an SVG's script would not run."""
    files = sorted(file for file in folder.glob(pattern) if file.suffix in MEDIA)
    return [picture(file) for file in files]


def picture(file: Path) -> Html:
    caption = tag("figcaption", file.stem.replace("_", " "))
    if file.stat().st_size > MAX_FIGURE:
        return tag("figure", tag("p", f"figures/{file.name} is too large to embed"), caption)
    data = base64.b64encode(file.read_bytes()).decode()
    image = tag("img", src=f"data:{MEDIA[file.suffix]};base64,{data}", alt=file.stem)
    return tag("figure", image, caption, class_="picture")


def document(title: str, parts: Iterable[Any]) -> str:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    body = Html(unique_ids(tag("body", tag("main", *parts))))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def unique_ids(text: str) -> str:
    """Inline figures may define the same markers and clips: give those of each a prefix."""
    parts = text.split("<svg ")  # text that is not ours has no `<` left
    for number, part in enumerate(parts[1:], start=1):
        figure, end, rest = part.partition("</svg>")
        figure = re.sub(r'( id="|href="#|url\(#)', rf"\1f{number}-", figure)
        parts[number] = figure + end + rest
    return "<svg ".join(parts)


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
COLOUR_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    **{colour: f"--series-{number}" for number, colour in enumerate(COLOURS)},
}
LIGHT = {"--ink": "#1c2024", "--faint": "#6a727a", "--back": "#ffffff", "--raised": "#f5f6f8"}
LIGHT |= {"--line": "#dde1e6", "--good": "#00694d", "--fair": "#8a5a00", "--bad": "#b03a00"}
LIGHT |= {f"--series-{number}": colour for number, colour in enumerate(COLOURS)}
DARK = {"--ink": "#e4e7ea", "--faint": "#8b9198", "--back": "#14171a", "--raised": "#1d2125"}
DARK |= {"--line": "#343a41", "--good": "#4cc9a0", "--fair": "#e6b04d", "--bad": "#ff8a57"}
DARK |= {"--series-0": COLOURS[5], "--series-1": "#f08a4b", "--series-5": COLOURS[0]}


def variables(colours: Mapping[str, str]) -> str:
    return "".join(f"{name}:{value};" for name, value in colours.items())


CSS = f""":root{{{variables(LIGHT)}color-scheme:light dark}}
@media(prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
main{{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem}}
h1{{font-size:1.6rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}}
h2{{font-size:1.15rem;margin:2.4rem 0 .7rem;padding-bottom:.3rem;
 border-bottom:1px solid var(--line)}}
h3{{font-size:1rem;margin:0 0 .4rem}}
p{{margin:.4rem 0;max-width:46rem}}
.quiet,figcaption,th,.tile span{{color:var(--faint)}}
code,pre,td.number{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}}
code{{overflow-wrap:anywhere}}
pre{{background:var(--raised);border:1px solid var(--line);border-radius:6px;padding:.8rem 1rem;
 margin:.6rem 0;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;max-height:32rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));
 gap:.6rem;margin:1rem 0}}
.tile{{background:var(--raised);border:1px solid var(--line);border-radius:6px;
 padding:.55rem .8rem}}
.tile span{{display:block;font-size:.8rem}}
.tile strong{{font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}}
.headline{{border-color:var(--series-0);border-width:2px}}
.headline strong{{font-size:1.9rem;line-height:1.2}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));
 gap:1rem 1.5rem;align-items:start}}
figure{{margin:0;min-width:0}}
figure svg{{width:100%;height:auto;display:block;overflow:visible}}
svg text{{font-family:inherit!important}}
figcaption{{font-size:.82rem;margin-top:.2rem}}
.picture img{{max-width:100%;background:#fff;border-radius:6px;padding:.4rem}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.9rem;width:100%;font-variant-numeric:tabular-nums}}
th{{text-align:left;font-weight:500}}
th,td{{padding:.24rem .7rem .24rem 0;border-bottom:1px solid var(--line);vertical-align:top}}
.facts td:first-child{{white-space:nowrap;width:1%;padding-right:1.5rem}}
.facts td{{overflow-wrap:anywhere}}
.ranking td{{white-space:nowrap}}
.ranking td:nth-child(2){{width:40%}}
.numeral{{text-align:right}}
.ranking mark{{background:none;color:var(--series-0);font-weight:700}}
.bar{{display:block;height:.62rem;margin-top:.42rem;border-radius:2px;background:var(--faint);opacity:.5}}
.bar.own{{background:var(--series-0);opacity:1}}
.badge{{display:inline-block;border:1px solid;border-radius:1rem;padding:0 .7rem;font-size:.82rem;
 font-weight:600;white-space:nowrap;color:var(--faint)}}
.badge.good{{color:var(--good)}}.badge.fair{{color:var(--fair)}}.badge.bad{{color:var(--bad)}}
.notice{{border-left:4px solid var(--fair);background:var(--raised);padding:.5rem .9rem;
 max-width:none}}
.claim{{border:1px solid var(--line);border-radius:8px;padding:1rem;margin:0 0 1rem}}
.claim header{{display:flex;gap:.8rem;justify-content:space-between;align-items:baseline;
 flex-wrap:wrap}}
details{{margin:.6rem 0}}summary{{cursor:pointer;color:var(--faint)}}
@media print{{details{{display:block}}pre{{max-height:none}}}}
"""
