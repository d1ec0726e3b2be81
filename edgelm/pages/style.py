"""The style sheet of the pages: light and dark, wide and narrow windows, paper."""

# `edgelm.pages.page` knows a report by the first characters of this text: they stay as they are.
STYLE = """
:root { --page: #ffffff; --ink: #1c2126; --soft: #56616b; --line: #d9dee3; --band: #f4f6f8; --good: #17734a;
  --bad: #b3261e; --heat: #b1430a; --series-1: #1f6feb; --series-2: #b85c00; --series-3: #8250c4; --series-4: #16806f;
  --series-5: #b0266f; --series-6: #6b6200; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e4e8ec; --soft: #a3aeb9;
  --line: #38414b; --band: #1e252c; --good: #4cc38a; --bad: #ff8078; --heat: #ffa24d; --series-1: #6cb0ff;
  --series-2: #ffab5e; --series-3: #bda2f5; --series-4: #5fd0c1; --series-5: #ff8ac4; --series-6: #d8cc5a; } }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 10px; } h2 { font-size: 19px; margin: 38px 0 6px; }
h3 { font-size: 15px; margin: 18px 0 4px; } p { margin: 6px 0; }
.soft { color: var(--soft); } code, .mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
.answer { font-size: 18px; line-height: 1.4; margin: 0 0 10px; padding: 10px 14px; background: var(--band);
  border-left: 6px solid var(--soft); border-radius: 0 6px 6px 0; }
.answer.pass { border-color: var(--good); } .answer.fail { border: 2px solid var(--bad); border-left-width: 12px; }
.badge { display: inline-block; padding: 0 10px; margin-right: 6px; border-radius: 5px; color: var(--page);
  font-weight: 700; white-space: nowrap; }
.pass .badge { background: var(--good); } .fail .badge { background: var(--bad); }
.cause { border-left: 6px solid var(--bad); padding: 6px 12px; background: var(--band); margin: 12px 0; }
.cause ul { margin: 4px 0; padding-left: 20px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 18px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; }
.card b { display: block; font-size: 19px; } .card span { color: var(--soft); font-size: 13px; display: block; }
.wide { overflow-x: auto; margin: 8px 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; overflow-wrap: normal; }
th, td { text-align: left; padding: 5px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.num, td.num { text-align: right; } td.num { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.long { min-width: 170px; overflow-wrap: anywhere; } td.hash { white-space: nowrap; }
.facts td:first-child { width: 38%; color: var(--soft); } .facts td { overflow-wrap: anywhere; }
.wide td:first-child, .wide th:first-child { position: sticky; left: 0; background: var(--page); }
.wide tr.fail td:first-child { background: var(--band); box-shadow: inset 5px 0 var(--bad); padding-left: 12px; }
tr.fail { background: var(--band); }
td.mark { white-space: nowrap; }
tr.fail td.mark { color: var(--bad); font-weight: 700; }
tr.pass td.mark { color: var(--good); } tr.none td.mark { color: var(--soft); }
figure { margin: 20px 0; } figcaption { font-weight: 600; }
.axis { color: var(--soft); font-size: 13px; } .axis.x { text-align: center; }
svg { display: block; width: 100%; height: auto; }
.broad svg { max-width: 960px; } .slim svg { max-width: 460px; } .slim { display: none; }
svg text { fill: var(--soft); font-size: 13px;
  paint-order: stroke; stroke: var(--page); stroke-width: 3px; } svg .name { fill: var(--ink); }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
.grid { stroke: var(--line); stroke-width: 1; } .span { fill: var(--band); }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 4; } svg .failed { fill: var(--bad); }
.lead { stroke: var(--soft); stroke-width: 1; }
.s { fill: none; stroke-width: 2; stroke-linejoin: round; } .slim .dense { stroke-width: 1; }
.m { fill: var(--page); stroke-width: 1.8; } .full { fill: currentColor; }
.k1 { stroke: var(--series-1); color: var(--series-1); } .k2 { stroke: var(--series-2); color: var(--series-2); }
.k3 { stroke: var(--series-3); color: var(--series-3); } .k4 { stroke: var(--series-4); color: var(--series-4); }
.k5 { stroke: var(--series-5); color: var(--series-5); } .k6 { stroke: var(--series-6); color: var(--series-6); }
.k2.s { stroke-dasharray: 9 4; } .k3.s { stroke-dasharray: 3 4; } .k4.s { stroke-dasharray: 12 3 3 3; }
.k5.s { stroke-dasharray: 6 3 2 3 2 3; } .k6.s { stroke-dasharray: 1 3; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); margin: 2px 0 4px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.legend svg { width: 34px; height: 14px; flex: none; }
.legend i { width: 22px; height: 14px; flex: none; background: var(--band); border: 1px solid var(--line); }
.legend i b { display: block; height: 100%; background: var(--heat); }
.key { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin: 4px 0; padding: 0; list-style: none; }
.cell { fill: var(--heat); } .empty { fill: var(--band); } .cross { stroke: var(--soft); stroke-width: 1; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
.text { white-space: pre-wrap; margin: 4px 0 14px; }
.more { color: var(--soft); border-bottom: 2px dotted var(--soft); }
@media screen and (max-width: 800px) { .broad { display: none; } .slim { display: block; }
  body { padding: 16px 16px 40px; } h1 { font-size: 21px; } .answer { font-size: 16px; }
  .cards { grid-template-columns: repeat(2, 1fr); } td.long { min-width: 150px; } }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2, h3, figcaption { break-after: avoid; }
  figure, tr, .card, .answer, .cause { break-inside: avoid; } .wide { overflow: visible; border: 0; }
  table { font-size: 9px; } th, td { padding: 2px 5px; } td.long { min-width: 0; }
  td.hash { white-space: normal; overflow-wrap: anywhere; } code, .mono { font-size: inherit; }
  details::details-content { content-visibility: visible; height: auto; }
  .span, .empty, .cell, .badge, .answer, .cause, .legend i b { print-color-adjust: exact; } }
"""
