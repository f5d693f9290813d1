"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// Colours that begin with "--" are properties of the page's style.
function coloured(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((each) => coloured(each, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
}

async function drawPlots() {
  const style = getComputedStyle(document.documentElement);
  for (const plot of facts.plots) {
    const element = document.getElementById("plot-" + plot.name);
    const config = { responsive: true, displayModeBar: false };
    await Plotly.react(element, coloured(plot.data, style), coloured(plot.layout, style), config);
  }
  document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
}

const MOST_ROWS = 500;

// Rows are shown as they are sorted and filtered, text only.
function makeTable(table, columns, rows, filter, note) {
  let order = { column: null, up: true };
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  columns.forEach((column, number) => {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    button.textContent = column.title;
    button.addEventListener("click", () => {
      order = { column: number, up: order.column === number ? !order.up : !column.number };
      show();
    });
    cell.scope = "col";
    cell.className = column.number ? "number" : "";
    cell.append(button);
    head.append(cell);
  });

  function show() {
    const wanted = filter.value.toLowerCase();
    const found = rows.filter((row) => row.some((value) => String(value).toLowerCase().includes(wanted)));
    if (order.column !== null) {
      const number = columns[order.column].number;
      found.sort((one, other) => {
        const [a, b] = [one[order.column], other[order.column]];
        const compared = number ? (a ?? -Infinity) - (b ?? -Infinity) : String(a).localeCompare(String(b), "en", { numeric: true });
        return order.up ? compared : -compared;
      });
    }
    [...head.cells].forEach((cell, number) => {
      cell.ariaSort = order.column === number ? (order.up ? "ascending" : "descending") : "none";
    });
    body.replaceChildren(
      ...found.slice(0, MOST_ROWS).map((row) => {
        const line = document.createElement("tr");
        row.forEach((value, number) => {
          const cell = line.insertCell();
          const { digits } = columns[number];
          cell.textContent = value === null ? "" : digits && value !== 0 ? value.toPrecision(digits) : value;
          cell.className = columns[number].number ? "number" : "";
        });
        return line;
      }),
    );
    note.textContent = `${Math.min(found.length, MOST_ROWS)} of ${rows.length} rows`;
  }
  filter.addEventListener("input", show);
  show();
}

for (const table of facts.tables) {
  const part = (name) => document.getElementById(`${name}-${table.name}`);
  makeTable(part("table"), table.columns, table.rows, part("filter"), part("note"));
}
document.getElementById("copy")?.addEventListener("click", (event) => {
  const range = document.createRange();
  range.selectNodeContents(document.getElementById("command"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  navigator.clipboard?.writeText(range.toString()).then(() => (event.target.textContent = "copied"));
});
dark.addEventListener("change", drawPlots);
drawPlots();
