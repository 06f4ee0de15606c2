"""How the report looks: colours for light and dark, and the style that uses them.

Series have colours that the colour-blind tell apart (Okabe & Ito, Color Universal Design, 2008),
and are told apart without them too: bars by hatching, lines by dashes and marks.
"""

COLOURS = {
    "light": {
        "page": "#ffffff",
        "panel": "#f5f6f7",
        "text": "#1c2127",
        "muted": "#565f69",
        "line": "#d5d9de",
        "link": "#0067a3",
        "hit": "#00664a",
        "s0": "#0072B2",  # Blue,
        "s1": "#D55E00",  # vermillion,
        "s2": "#000000",  # black.
    },
    "dark": {
        "page": "#15181c",
        "panel": "#1e2227",
        "text": "#e9e7e3",
        "muted": "#a9b1ba",
        "line": "#3a4149",
        "link": "#7cc4f0",
        "hit": "#4fd1a8",
        "s0": "#56B4E9",  # Sky blue,
        "s1": "#E69F00",  # orange,
        "s2": "#FFFFFF",  # white, which stands for black.
    },
}
SERIES = ("s0", "s1", "s2")
_DASHES = ("none", "7 4", "2 4")

_RULES = """
*, *::before, *::after { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, header, footer { max-width: 72rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
a { color: var(--link); }
.muted, figcaption, .note { color: var(--muted); }
.note { font-size: .875rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0;
  margin: 1rem 0 0; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin: 1.2rem 0; }
.tiles div { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; }
.tiles dt { color: var(--muted); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.7rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 500; white-space: normal; min-width: 7rem; }
tr.ours th, tr.ours td { font-weight: 700; }
td small { color: var(--muted); font-weight: 400; }
.words td { white-space: normal; }
.words :is(td, th):last-child { text-align: left; min-width: 14rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.2rem 2rem; align-items: start; }
figure { margin: .6rem 0; min-width: 0; max-width: 27rem; }
figcaption { font-size: .9rem; margin-bottom: .3rem; color: var(--text); font-weight: 500; }
.chart { width: 100%; height: auto; display: block; font-size: 11.5px; }
.chart text { fill: var(--text); }
.chart text.muted { fill: var(--muted); }
.chart .middle { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart .value { font-weight: 600; }
.grid { stroke: var(--line); fill: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0;
  margin: 0 0 .4rem; font-size: .85rem; }
.key { width: 26px; height: 13px; margin-right: .4rem; vertical-align: -1px; }
.patterns { position: absolute; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1rem; }
article { background: var(--panel); border-radius: .6rem; padding: .9rem 1.1rem; min-width: 0;
  break-inside: avoid; }
article h4 { margin: 0 0 .2rem; font-size: 1rem; }
article img { max-width: 100%; border-radius: .3rem; background: #fff; margin: 0 .4rem .4rem 0; }
article p { margin: 0 0 .5rem; font-size: .85rem; }
article h5 { margin: .6rem 0 .15rem; font-size: .8rem; font-weight: 500; color: var(--muted); }
article ol, article ul { margin: 0; padding-left: 0; list-style: none; font-size: .9rem; }
article li { display: grid; grid-template-columns: 1.3rem 1fr auto; gap: .3rem; }
article li.hit { color: var(--hit); font-weight: 600; }
article li span:last-child { color: var(--muted); font-weight: 400; font-size: .8rem;
  font-variant-numeric: tabular-nums; }
.unseen-by-eye { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
pre, code { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; white-space: pre-wrap; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
  font-size: .9rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; }
.card img { max-width: 100%; height: auto; background: #ffffff; border-radius: .4rem; }
footer { padding-bottom: 3rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print {
  nav { display: none; }
  .scroll { overflow: visible; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
}
"""


def _variables(scheme: str) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in COLOURS[scheme].items())


def style() -> str:
    """The page's whole style sheet; printed, it is light."""
    series = ".s0 { fill: var(--s0); }\n"
    for i, name in enumerate(SERIES):
        if i:
            series += f".s{i} {{ fill: url(#pattern{i}); stroke: var(--{name}); }}\n"
            drawn = f"fill: var(--{name});" if i == 2 else f"fill: none; stroke: var(--{name});"
            series += f".p{i} {{ {drawn} stroke-width: 1.6; }}\n"
        series += (
            f".l{i} {{ fill: none; stroke: var(--{name}); stroke-width: 2; "
            f"stroke-dasharray: {_DASHES[i]}; }}\n.m{i} {{ fill: var(--{name}); }}\n"
        )
    return (
        f":root {{ {_variables('light')} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables('dark')} }} }}\n"
        f"{_RULES.strip()}\n{series}"
    )
