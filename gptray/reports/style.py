"""The style sheet of the report: light and dark, narrow and wide, screen and paper."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --soft: #5b6470; --line: #e2e5e9;
  --panel: #f5f6f8; --train: #2f6db5; --val: #c4561a; --single: #5b6470; --best: #1b7f3b;
  --turned: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --text: #e6e8ea; --soft: #9aa3ad;
  --line: #2c3238; --panel: #1e2328; --train: #6aa9f0; --val: #f0985c; --single: #aab3bd;
  --best: #5cc47e; --turned: #f2857d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.25rem 0 .4rem; }
p { margin: .5rem 0; }
small, .soft, figcaption small { color: var(--soft); font-size: .82rem; font-weight: normal; }
.headline { font-size: 1.3rem; line-height: 1.4; margin: 1rem 0; }
.state { color: var(--soft); font-size: .9rem; }
.state b { color: var(--text); }
.state .running { color: var(--best); }
ol.advice { margin: .5rem 0; padding-left: 1.4rem; }
ol.advice small { display: block; }
ol.advice pre { margin: .3rem 0 .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.25rem 0 .5rem; }
.tiles div { flex: 1 1 9rem; background: var(--panel); border-radius: 6px; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
figure { margin: 1.25rem 0; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .6rem; }
.key { font-size: .85rem; }
.key i { display: inline-block; width: 1.1em; height: 3px; margin-right: .35em;
  vertical-align: middle; background: var(--single); }
.key i.train { background: var(--train); }
.key i.val, .key i.own, .key i.early { background: var(--val); }
.key i.whole, .key i.run { background: var(--train); }
.key i.winner, .key i.better, .key i.spared { background: var(--best); }
.key i.wrong, .key i.worse { background: var(--turned); }
svg.chart { display: block; width: 100%; height: auto; }
svg.narrow { display: none; }
svg.bar { display: block; width: 100%; height: 1.4rem; border-radius: 4px; }
svg text { font-size: 12px; fill: var(--soft); }
svg text.x { text-anchor: middle; }
svg text.y { text-anchor: end; }
svg .grid { stroke: var(--line); fill: none; }
svg .axis { stroke: var(--soft); fill: none; }
svg .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .curve.train { stroke: var(--train); }
svg .curve.val { stroke: var(--val); stroke-width: 2; }
svg .curve.single { stroke: var(--single); }
svg .curve.cut { stroke: var(--single); stroke-width: 1; opacity: .45; }
svg .curve.whole { stroke: var(--train); stroke-width: 1.2; opacity: .8; }
svg .curve.wrong { stroke: var(--turned); stroke-width: 1.2; stroke-dasharray: 3 2; }
svg .curve.own { stroke: var(--val); stroke-width: 2; }
svg .curve.winner { stroke: var(--best); stroke-width: 3; }
svg .dot.cut { fill: var(--single); opacity: .6; }
svg .dot.whole { fill: var(--train); }
svg .dot.wrong { fill: var(--turned); }
svg .dot.own { fill: var(--val); }
svg .dot.winner { fill: var(--best); }
svg .rung { stroke: var(--soft); stroke-dasharray: 2 4; fill: none; }
svg .reach { fill: none; stroke-width: 2.2; stroke: var(--single); }
svg .reach.better { stroke: var(--best); }
svg .reach.worse { stroke: var(--turned); }
svg .dot.better { fill: var(--best); }
svg .dot.worse { fill: var(--turned); }
svg .zero { stroke: var(--soft); fill: none; }
svg .share { fill: var(--single); opacity: .35; }
svg .share.run { fill: var(--train); opacity: 1; }
svg .share.spared { fill: var(--best); opacity: .75; }
svg .share.early { fill: var(--val); opacity: .75; }
svg .share.wrong { fill: var(--turned); opacity: .75; }
svg text.label { fill: var(--text); }
svg text.strong { font-weight: 600; }
svg text.over { paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr));
  gap: .8rem; }
.panels figure { margin: .3rem 0; break-inside: avoid; }
.panels figcaption { overflow-wrap: anywhere; }
svg .dot.val { fill: var(--val); }
svg .dot.train { fill: var(--train); }
svg .dot.single { fill: var(--single); }
svg .dot.hollow { fill: var(--page); stroke-width: 1.4; opacity: 1; }
svg .hollow.cut { stroke: var(--single); }
svg .hollow.own { stroke: var(--val); }
svg .hollow.whole { stroke: var(--train); }
svg .hollow.single { stroke: var(--single); }
svg .hollow.winner { stroke: var(--best); }
svg .shade { fill: var(--turned); opacity: .07; }
svg path.mark { fill: none; stroke-width: 1.2; }
svg path.best { stroke: var(--best); stroke-dasharray: 5 3; }
svg path.turned { stroke: var(--turned); stroke-dasharray: 2 3; }
svg circle.mark { fill: var(--page); stroke-width: 2; }
svg circle.best { stroke: var(--best); }
svg circle.turned { stroke: var(--turned); }
svg text.mark { font-weight: 600; paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
svg text.best { fill: var(--best); }
svg text.turned { fill: var(--turned); }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.25rem; }
th, td { padding: .4rem .3rem .4rem .8rem; border-bottom: 1px solid var(--line);
  vertical-align: top; text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
thead th { font-size: .85rem; color: var(--soft); font-weight: normal; overflow-wrap: normal; }
tbody th { text-align: left; padding-left: 0; font-weight: 600; overflow-wrap: normal; }
td.number { white-space: nowrap; }
tr.explained th, tr.explained td { border-bottom: 0; padding-bottom: 0; }
tr.best th, tr.best td { color: var(--best); font-weight: 600; }
tr.how td { text-align: left; padding: 0 0 .4rem; color: var(--soft); font-size: .82rem;
  line-height: 1.35; }
blockquote { margin: .4rem 0; padding: .6rem .8rem; background: var(--panel); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; line-height: 1.45; }
blockquote i { color: var(--soft); font-size: .82rem; }
.label { color: var(--soft); font-size: .82rem; margin: .5rem 0 0; }
pre { background: var(--panel); border-radius: 6px; padding: .8rem; font-size: .82rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .8rem; }
@media (max-width: 600px) {
  main { padding: 1rem .9rem 2rem; }
  .headline { font-size: 1.12rem; }
  svg.wide { display: none; }
  svg.narrow { display: block; }
  th, td { padding-left: .5rem; font-size: .88rem; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --soft: #444; --line: #ccc;
    --panel: #f3f3f3; --train: #2f6db5; --val: #c4561a; --single: #444; --best: #1b7f3b;
    --turned: #b3261e; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  svg.wide { display: block; }
  svg.narrow { display: none; }
  figure, tr, blockquote, .tiles div, li { break-inside: avoid; }
  h2, h3, .label, tr.explained { break-after: avoid; }
  details.screen { display: none; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
