"""The style sheet of the report."""

from __future__ import annotations

__all__ = ["STYLE"]

# Blue and orange: told apart by most colour-blind readers. The nine bands are Paul Tol's "muted" scheme, lighter in the
# dark.
STYLE = """\
:root {
  --page: #ffffff; --card: #f6f7f9; --ink: #16191d; --soft: #545b66; --rule: #d4d8de; --warn: #fff4d6; --edge: #a06a00;
  --helps: #4a90d9; --harms: #ee8a45;
  --c0: #332288; --c1: #88ccee; --c2: #117733; --c3: #ddcc77; --c4: #cc6677; --c5: #44aa99; --c6: #aa4499;
  --c7: #999933; --c8: #bbbbbb; --l0: #0069a8; --l1: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --ink: #e9ecf0; --soft: #a9b1bc; --rule: #3a414b; --warn: #33290f;
    --edge: #e0a83a; --helps: #2f7fd0; --harms: #cf6a1f;
    --c0: #7a6bd6; --c1: #66b3dd; --c2: #3aa860; --c3: #c9b75e; --c4: #d9788a; --c5: #4fbcaa; --c6: #c267b3;
    --c7: #b0b04a; --c8: #7d848d; --l0: #5bb3ee; --l1: #a9b1bc;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.25; margin: 2rem 0 .75rem; padding-top: 1rem;
  border-top: 2px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
footer { color: var(--soft); margin-top: 2rem; border-top: 1px solid var(--rule); }
.warning { background: var(--warn); border-left: 4px solid var(--edge); border-radius: 4px; padding: .25rem 1rem;
  margin: 1rem 0; }
.warning h3, .warning h4 { margin: .5rem 0 0; }
.warning ul { margin: .25rem 0 .5rem; padding-left: 1.2rem; }
.scroll { position: relative; overflow-x: auto; margin: .25rem 0 .75rem; max-width: 100%; }
/* A shadow at the side where a wide table goes on: its covers move along with the table, itself it stays. */
.scroll { background: linear-gradient(to right, var(--page) 50%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 50%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--soft), transparent) left / .6rem 100% no-repeat scroll,
  linear-gradient(to left, var(--soft), transparent) right / .6rem 100% no-repeat scroll; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--l0); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; overflow-wrap: normal; }
tbody th { position: sticky; left: 0; background: var(--page); min-width: 7.5rem; max-width: 11rem;
  overflow-wrap: anywhere; }
thead th { vertical-align: bottom; }
.heat thead th + th, .numbers thead th + th { min-width: 6.5rem; max-width: 9rem; overflow-wrap: anywhere; }
@media (min-width: 60rem) { tbody th { min-width: 10rem; } }
.numbers td, .heat td, .numbers thead th + th, .heat thead th + th { text-align: right; }
.numbers td, .heat td { white-space: nowrap; }
.heat td { border: 2px solid var(--page); color: var(--ink); }
.heat td small, .numbers td small { display: block; color: var(--ink); font-size: .75rem; }
td.none { color: var(--soft); font-style: italic; white-space: normal; }
td.helps { background: color-mix(in srgb, var(--helps) var(--strength), var(--card)); }
td.harms { background: color-mix(in srgb, var(--harms) var(--strength), var(--card)); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
figure { margin: .5rem 0; }
figcaption { color: var(--soft); font-size: .85rem; max-width: 44rem; }
.picture { max-width: 36rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem 1rem; }
.charts figcaption { color: var(--ink); font-weight: 600; }
svg.chart { display: block; width: 100%; height: auto; }
svg.spark { display: block; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .axis, svg .leader { fill: none; stroke: var(--soft); stroke-width: .7; }
svg .band { stroke: var(--page); stroke-width: 1.2; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .l0 { stroke: var(--l0); } svg .l1 { stroke: var(--l1); stroke-dasharray: 5 3; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.c8 { fill: var(--c8); }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; } }
@media print { .scroll { overflow: visible; } }
"""
