// Asks what a dashboard's panels ask:   query.mjs DASHBOARD URL SECONDS
// Prints a script with the answers; a query without one is an error.
import fs from 'node:fs';

const [file, url, seconds] = process.argv.slice(2);
const dashboard = JSON.parse(fs.readFileSync(file));
const to = Math.floor(Date.now() / 1000);
const from = to - Number(seconds);
const answers = {};
for (const panel of dashboard.panels) {
  answers[panel.id] = [];
  for (const target of panel.targets) {
    const query = target.expr.replaceAll('$node', '.*').replaceAll('$__rate_interval', '40s');
    const range = new URLSearchParams({ query, start: from, end: to, step: 2 });
    const answer = await (await fetch(`${url}/api/v1/query_range?${range}`)).json();
    const series = answer.data?.result ?? [];
    const points = series.flatMap((one) => one.values).filter(([, value]) => value !== 'NaN');
    console.error(`${panel.title}: ${series.length} series, ${points.length} points`);
    if (points.length === 0) {
      throw new Error(`no answer to ${query}: ${JSON.stringify(answer)}`);
    }
    answers[panel.id].push(series);
  }
}
console.log(`window.SAMPLE = ${JSON.stringify({ dashboard, answers, from, to })};`);
