"""CSS of the pages of `--report`, after the common one of `mosaic.reports.html`."""

STYLE = """
.crumb { margin-bottom: 1.2rem; } .prompt { font-size: 1.2rem; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem; }
.badge { display: inline-flex; flex: none; width: 1.65em; height: 1.65em; margin-right: .45rem; border: 3px solid; border-radius: 50%;
  align-items: center; justify-content: center; background: #fff; color: var(--ink); font-weight: 700; font-size: .85rem; }
.who { display: flex; align-items: center; min-width: 0; } .name { overflow-wrap: break-word; min-width: 0; }
.line { display: inline-block; margin-right: 1rem; } .hard { image-rendering: pixelated; } .symbols { position: absolute; }

.hero { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 1.5rem; align-items: start; margin: 1.5rem 0; }
.references { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem; list-style: none;
  margin: 0 0 1.2rem; padding: 0; }
.references .who { margin-top: .5rem; font-size: .9rem; line-height: 1.25; } .references .soft { font-size: .85rem; }
svg.picture { display: block; width: 100%; }
.result { margin: 0; } .result img { display: block; width: 100%; border: 0; border-radius: 5px; } .result figcaption { margin-top: .5rem; }
.finding { border-left: 4px solid var(--accent); padding: .7rem 1rem; margin-bottom: 1.2rem; background: var(--card); }
.summary { width: 100%; font-size: .92rem; } .summary th { font-weight: 500; } .summary tbody th { text-align: left; padding-left: 0; }
.summary thead th { color: var(--soft); line-height: 1.2; vertical-align: bottom; }
.summary thead th:first-child { text-align: left; padding-left: 0; }

.look { margin: 0 0 1rem; padding: 1rem; } .look svg { display: block; width: 100%; height: auto; }
.look .figures { display: grid; grid-template-columns: minmax(0, 2.15fr) minmax(0, 1fr); gap: 1rem; }
.look p { margin: .4rem 0 0; font-size: .92rem; }
.look .scale { display: flex; gap: .6rem; align-items: center; color: var(--soft); font-size: .85rem; padding: 0 5%; }
.bar { flex: 1; height: .7rem; border-radius: 3px; border: 1px solid var(--line); background: linear-gradient(90deg, #d9d9d9, #86131f); }

.scroll { overflow-x: auto; }
.leakage th { text-align: left; border: 0; font-weight: 500; } .leakage thead td { border: 0; }
.leakage thead th { vertical-align: bottom; padding: .3rem .6rem; max-width: 9rem; }
.leakage td { text-align: center; min-width: 5.2rem; padding: .7rem .6rem; border: 1px solid #fff; font-weight: 600; }
.leakage td.own { outline: 3px solid var(--ink); outline-offset: -3px; }
.leakage td.rest, .leakage tfoot td { color: var(--soft); font-weight: 400; }
.leakage tfoot th { color: var(--soft); font-size: .88rem; line-height: 1.2; }

.chart { display: block; width: 100%; max-width: 860px; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
  font-size: 13px; fill: var(--ink); }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; overflow-x: auto; font-size: .82rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }

.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 1rem; list-style: none;
  margin: 1.5rem 0; padding: 0; }
.cases a { display: block; height: 100%; text-decoration: none; color: inherit; }
.cases a:hover, .cases a:focus-visible { border-color: var(--accent); }
.cases h2 { margin: .6rem 0 .2rem; font-size: 1.05rem; color: var(--accent); text-decoration: underline; }
.cases p { margin: 0 0 .4rem; overflow-wrap: anywhere; } .cases img { border: 0; width: 100%; height: 170px; object-fit: contain; }
h1, .prompt { overflow-wrap: anywhere; }
@media (max-width: 760px) { .hero, .look .figures { grid-template-columns: minmax(0, 1fr); } }
@media print { body { background: #fff; max-width: none; } .look, .card { break-inside: avoid; } }
"""
