// The queries of an evaluation: a table that sorts by its columns, each query opening into its stages. What it reads is
// described in query_view.py.
"use strict";

const view = JSON.parse(document.getElementById("data").textContent);
const gainShown = view.before !== view.after;
const state = { measure: view.measures[0], column: null, rising: true }; // column: of `columns`; null: as given

const valuesOf = (query) => query.values[state.measure];
const gainOf = (query) => valuesOf(query)[view.after] - valuesOf(query)[view.before];
const relevantOf = (query) => query.judged.filter((one) => one.relevant);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

// Name, value to sort by, and cell of each column after that of the query.
const columns = [
  { name: "relevant", value: (query) => relevantOf(query).length, text: String, kind: () => "" },
  ...view.systems.map((name, place) => ({
    name, value: (query) => valuesOf(query)[place], text: (value) => value.toFixed(3), kind: () => "",
  })),
  ...(gainShown ? [{
    name: `gain over ${view.systems[view.before]}`, value: gainOf, text: signed,
    kind: (value) => (Math.abs(value) < 1e-12 ? "" : value > 0 ? "gain" : "loss"),
  }] : []),
];

function drawQueries() {
  const measure = element(
    "select", { id: "measure" }, view.measures.map((name) => element("option", { value: name }, name)),
  );
  const head = element("tr");
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, head), body);
  const opened = new Map(); // rows of queries that are open, by id

  const rowsOf = (query) => {
    const open = opened.get(query.id);
    const button = element("button", { type: "button", className: "query", "aria-expanded": String(Boolean(open)) });
    button.append(textElement("span", "", query.query));
    button.addEventListener("click", () => toggle(query));
    const cells = columns.map(({ value, text, kind }) =>
      element("td", { className: `number ${kind(value(query))}` }, text(value(query))));
    return [element("tr", {}, element("td", {}, button), cells), ...(open ? [open] : [])];
  };
  const toggle = (query) => {
    if (opened.has(query.id)) opened.delete(query.id);
    else opened.set(query.id, element("tr", { className: "opened" }, element("td", { colSpan: columns.length + 1 }, drawQuery(query))));
    history.replaceState(null, "", opened.has(query.id) ? `#${encodeURIComponent(query.id)}` : "#");
    draw();
    buttonOf(query).focus();
  };
  const buttonOf = (query) => body.querySelectorAll(".query")[sorted().indexOf(query)];
  const sorted = () => {
    if (state.column === null) return view.queries;
    const sign = state.rising ? 1 : -1;
    return [...view.queries].sort((a, b) => sign * (state.column.value(a) - state.column.value(b)));
  };
  const headerOf = (column) => {
    const own = state.column === column;
    const arrow = own ? element("span", { "aria-hidden": "true" }, state.rising ? " ▲" : " ▼") : "";
    const button = element("button", { type: "button" }, textElement("bdi", "", column.name), arrow);
    button.addEventListener("click", () => {
      state.rising = own ? !state.rising : true;
      state.column = column;
      draw();
      head.querySelectorAll("button")[columns.indexOf(column)].focus();
    });
    const order = own ? (state.rising ? "ascending" : "descending") : "none";
    return element("th", { scope: "col", "aria-sort": order }, button);
  };
  const draw = () => {
    head.replaceChildren(element("th", { scope: "col" }, "query"), ...columns.map(headerOf));
    body.replaceChildren(...sorted().flatMap(rowsOf));
  };

  measure.addEventListener("change", () => {
    state.measure = measure.value;
    draw();
  });
  draw();
  const choice = element("p", {}, element("label", { htmlFor: "measure" }, "Measure "), measure);
  document.querySelector(".queries").append(choice, element("div", { className: "scroll" }, table));
  const linked = view.queries.find((query) => query.id === decodeURIComponent(location.hash.slice(1)));
  if (linked) {
    toggle(linked);
    buttonOf(linked).scrollIntoView();
  }
}

// Where the relevant documents are, and the stages.
function drawQuery(query) {
  const own = Object.entries(query.documents).map(([id, one]) => [id, { ...view.documents[id], ...one }]);
  const documents = { ...view.documents, ...Object.fromEntries(own) };
  const answers = query.answers.map((answer) => {
    const stages = answer.stages.map((stage) => ({ ...stage, seconds: view.seconds[answer.name][stage.name] }));
    return { ...answer, query: query.query, documents, stages };
  });
  const judged = new Map(query.judged.map((one) => [
    one.id, { name: one.relevant ? `relevant, grade ${one.grade}` : `judged, grade ${one.grade}`, relevant: one.relevant },
  ]));
  const load = async (id) => foundDocument(answers, id);
  const grid = drawStages(answers, { load, judged, shown: view.shown });
  return element("div", { className: "of-query" }, drawPlaces(query, answers, judged, load), grid);
}

function drawPlaces(query, answers, judged, load) {
  const stages = answers.flatMap(stagesOf);
  const head = ["relevant document", "grade", ...stages.map(nameOfStage)];
  const rows = relevantOf(query).map((one) => {
    const open = element("button", { type: "button", className: "query" }, textElement("bdi", "", one.id));
    const found = foundDocument(answers, one.id);
    open.addEventListener("click", () => openDocument(one.id, { answers, stages, judged, load }));
    const cells = stages.map((stage) => placeOf(one, stage));
    return element(
      "tr", {},
      element("td", {}, open, found.text === undefined ? null : textElement("span", "beginning quiet", found.text, snippet(found))),
      [String(one.grade), ...cells].map((cell) => element("td", {}, cell)),
    );
  });
  const cells = head.map((name) => element("th", { scope: "col" }, textElement("bdi", "", name)));
  return element("table", { className: "places" }, element("thead", {}, element("tr", {}, cells)), element("tbody", {}, rows));
}

function placeOf(judged, stage) {
  if (judged.absent.includes(stage.retriever)) return "not in the corpus";
  const rank = stage.ranks.get(judged.id);
  return rank === undefined ? `not among ${number(stage.found)}` : `rank ${rank}`;
}

drawQueries();
