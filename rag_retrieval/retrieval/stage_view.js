// The stages of a search side by side, and a document in full: for the server's page and the report of an evaluation.
//
// An answer is what POST /search gives with `stages`: {query, stages: [{name, seconds, results: [{id, score, rank}]}],
// results: [{id, text, metadata, passage}], documents: {id: {text, metadata, passage}}}. Seconds, results and passages
// may be missing. The text of a document may be a part: it then has `begin`, the characters before it, and `characters`,
// of the whole, in which the passage has its place. Texts are data: they become text nodes and nothing else, and each is
// isolated from the direction of its neighbours.
"use strict";

const LABELS = { bm25: "words", dense: "vectors", multi_vector: "token vectors" }; // others are called by their names
const SNIPPET = 600; // characters, of which as many lines are shown as the style says
const BEFORE_PASSAGE = 40; // characters

const label = (stage) => LABELS[stage] ?? stage;
const number = (value) => value.toLocaleString("en-US");
const shownScore = (score) => String(Number(score.toPrecision(4)));
const shownTime = (seconds) => (seconds < 1 ? `${Number((1000 * seconds).toPrecision(2))} ms` : `${seconds.toFixed(2)} s`);

// properties: of the element where it has such, else attributes. Children: elements and texts; null is left out.
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

// An element with a text of the data: its own direction and, for fonts and line breaks, its language by the script.
function textElement(name, className, text, children = [text]) {
  const made = element(name, { className, dir: "auto" }, children);
  if (/[\u3040-\u30ff]/u.test(text)) made.lang = "ja";
  else if (/\p{Script=Han}/u.test(text)) made.lang = "zh";
  return made;
}

// ---- texts and passages

// The server counts characters (code points), JavaScript units of UTF-16.
function unitsOf(text, characters) {
  let units = 0;
  for (; characters > 0 && units < text.length; characters--) units += text.codePointAt(units) > 0xffff ? 2 : 1;
  return units;
}

function wholeText({ text, passage, begin = 0 }) {
  if (!passage) return [text];
  const [start, end] = [passage.start, passage.end].map((place) => unitsOf(text, place - begin));
  return [text.slice(0, start), element("mark", {}, text.slice(start, end)), text.slice(end)];
}

// The beginning of a text or, where there is one, the surroundings of its best passage.
function snippet({ text, passage, begin = 0, characters }) {
  const first = passage ? Math.max(begin, passage.start - BEFORE_PASSAGE) : begin;
  const start = unitsOf(text, first - begin);
  const end = start + unitsOf(text.slice(start), SNIPPET);
  const cut = text.slice(start, end);
  const goesOn = end < text.length || begin + [...text].length < characters;
  return [first > 0 ? "… " : null, ...wholeText({ text: cut, passage, begin: first }), goesOn ? " …" : null];
}

function describePlace({ text, passage, characters = [...text].length }) {
  const [start, end, all] = [passage.start, passage.end, characters].map(number);
  return `best passage: characters ${start} to ${end} of ${all}`;
}

// Of a passage that was cut out of a file.
function describeFile({ file, start, end }) {
  if (!file || !Number.isInteger(start) || !Number.isInteger(end)) return null;
  return textElement("span", "place", `${file}, characters ${number(start)} to ${number(end)}`);
}

// ---- stages

// The stages of an answer, each with the ranks of its documents and the stages whose lists it has put in another order.
function stagesOf(answer) {
  const stages = answer.stages.map((stage, place, all) => ({
    ...stage,
    retriever: answer.name,
    last: place === all.length - 1,
    ranks: new Map(stage.results.map((hit) => [hit.id, hit.rank])),
    scores: new Map(stage.results.map((hit) => [hit.id, hit.score])),
  }));
  stages.forEach((stage, place) => {
    if (stage.name === "fused") stage.inputs = stages.slice(0, place);
    else stage.inputs = ["reranked", "combined"].includes(stage.name) ? stages.slice(place - 1, place) : [];
  });
  return stages;
}

function nameOfStage(stage) {
  return stage.retriever ? `${stage.retriever}, ${label(stage.name)}` : label(stage.name);
}

function foundDocument(answers, id) {
  for (const answer of answers) {
    const result = (answer.results ?? []).find((one) => one.id === id);
    if (result) return result;
    if (answer.documents && Object.hasOwn(answer.documents, id)) return answer.documents[id];
  }
  return {};
}

// From the rank in an input to the rank here, as an arrow with a number.
function move(input, hit, several) {
  const from = input.ranks.get(hit.id);
  const name = several ? `${label(input.name)} ` : "";
  const [kind, sign, words] =
    from === undefined ? ["quiet", "–", `not in ${label(input.name)}`]
    : from > hit.rank ? ["up", `▲${from - hit.rank}`, `up ${from - hit.rank} from rank ${from} in ${label(input.name)}`]
    : from < hit.rank ? ["down", `▼${hit.rank - from}`, `down ${hit.rank - from} from rank ${from} in ${label(input.name)}`]
    : ["quiet", "=", `the same rank in ${label(input.name)}`];
  const seen = element("span", { "aria-hidden": "true" }, name + sign);
  return element("span", { className: kind, title: words }, seen, element("span", { className: "for-readers" }, words));
}

const drawBadge = (judged) => element("span", { className: judged.relevant ? "badge" : "quiet" }, judged.name);

function drawHit(hit, stage, view) {
  const found = foundDocument(view.answers, hit.id);
  const { text = null, passage = null, metadata = {} } = found;
  const judged = view.judged.get(hit.id);
  const head = element(
    "span", { className: "head" },
    element("span", { className: "rank" }, String(hit.rank)),
    textElement("bdi", "id", hit.id),
    element("span", { className: "score quiet", title: "score" }, shownScore(hit.score)),
  );
  const moves = stage.inputs.map((input) => move(input, hit, stage.inputs.length > 1));
  const badge = judged ? drawBadge(judged) : null;
  const button = element(
    "button", { className: `hit${judged?.relevant ? " relevant" : ""}`, type: "button", tabIndex: -1 }, head,
    badge || moves.length ? element("span", { className: "moves" }, badge, moves) : null,
    text === null ? null : textElement("span", "snippet", text, snippet(found)),
    passage && stage.last ? element("span", { className: "place" }, describePlace(found)) : null,
    stage.last ? describeFile(metadata) : null,
  );
  button.hit = hit.id;
  button.addEventListener("click", () => openDocument(hit.id, view));
  return button;
}

// The first documents of a stage and the relevant ones below, with a button for the rest.
function drawStage(stage, view) {
  const list = element("ol");
  const draw = (all) => {
    let before = 0;
    const drawn = [];
    for (const hit of stage.results) {
      if (!all && hit.rank > view.shown && !view.judged.get(hit.id)?.relevant) continue;
      if (hit.rank > before + 1) drawn.push(element("li", { className: "gap", "aria-hidden": "true" }, "⋮"));
      drawn.push(element("li", {}, drawHit(hit, stage, view)));
      before = hit.rank;
    }
    list.replaceChildren(...drawn);
  };
  draw(false);
  const left = stage.results.length - list.querySelectorAll(".hit").length;
  const more = left > 0 ? element("button", { className: "more", type: "button" }, `show ${number(left)} more`) : null;
  more?.addEventListener("click", () => {
    const place = list.querySelectorAll(".hit").length;
    draw(true);
    more.remove();
    list.querySelectorAll(".hit")[place].focus();
  });
  const others = new Set([stage.retriever, stage.name, stage.last ? view.answers[0].score_type : undefined]);
  [undefined, label(stage.name)].forEach((name) => others.delete(name));
  const heading = element(
    "h3", {}, label(stage.name), others.size ? textElement("bdi", "quiet", [...others].join(" · ")) : null,
    stage.seconds === undefined ? null : element("span", { className: "quiet seconds" }, shownTime(stage.seconds)),
  );
  const none = stage.results.length ? null : element("p", { className: "quiet" }, "nothing found");
  return element(
    "section", { className: `stage${stage.last ? " last" : ""}`, "aria-label": nameOfStage(stage) }, heading, none, list,
    more,
  );
}

// A column for each stage of each answer. options.load(id): a promise of {text, metadata}, the document in full.
// options.judged: {name, relevant} by id, of documents that are marked. options.shown: documents of a stage at first.
function drawStages(answers, { load, judged = new Map(), shown = 10 }) {
  const stages = answers.flatMap(stagesOf);
  const view = { answers, stages, load, judged, shown };
  const columns = stages.map((stage) => drawStage(stage, view));
  const grid = element("div", { className: "stages", role: "group", "aria-label": "Stages" }, columns);
  const hits = (column) => [...column.querySelectorAll(".hit")];
  const start = columns.length && hits(columns[columns.length - 1])[0];
  if (start) start.tabIndex = 0;

  const light = (id) => grid.querySelectorAll(".hit").forEach((hit) => hit.classList.toggle("same", hit.hit === id));
  grid.addEventListener("mouseover", (event) => light(event.target.closest(".hit")?.hit));
  grid.addEventListener("mouseleave", () => light(undefined));
  grid.addEventListener("focusin", (event) => {
    const focused = event.target.closest(".hit");
    if (!focused) return;
    grid.querySelectorAll(".hit[tabindex='0']").forEach((hit) => { hit.tabIndex = -1; });
    focused.tabIndex = 0;
    light(focused.hit);
  });
  grid.addEventListener("focusout", () => light(undefined));
  grid.addEventListener("keydown", (event) => {
    const focused = event.target.closest(".hit");
    const next = focused && neighbour(event.key, focused, columns, hits);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  return grid;
}

// Up and down: in the column. Left and right: the same document in the next column, else what stands beside it.
function neighbour(key, focused, columns, hits) {
  const column = columns.findIndex((one) => one.contains(focused));
  const own = hits(columns[column]);
  const place = own.indexOf(focused);
  if (key === "ArrowDown") return own[place + 1];
  if (key === "ArrowUp") return own[place - 1];
  if (key === "Home") return own[0];
  if (key === "End") return own[own.length - 1];
  if (key !== "ArrowLeft" && key !== "ArrowRight") return null;
  const beside = columns[column + (key === "ArrowRight" ? 1 : -1)];
  const others = beside ? hits(beside) : [];
  return others.find((hit) => hit.hit === focused.hit) ?? others[Math.min(place, others.length - 1)];
}

// ---- a document in full

async function openDocument(id, view) {
  const title = element("h2", { id: "document-title" }, textElement("bdi", "", id));
  const close = element("button", { type: "button" }, "Close");
  const body = element("div", { className: "body", tabIndex: 0 });
  const header = element("header", {}, title, close);
  const dialog = element("dialog", { className: "document", "aria-labelledby": "document-title" }, header, body);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  const found = foundDocument(view.answers, id);
  fillDocument(body, id, found, view, "");
  dialog.showModal();
  body.focus();
  try {
    fillDocument(body, id, { ...found, ...(await view.load(id)) }, view, "");
  } catch (error) {
    fillDocument(body, id, found, view, error.message);
  }
  body.querySelector("mark")?.scrollIntoView({ block: "center" });
}

function fillDocument(body, id, found, view, problem) {
  const { text = null, metadata = {}, passage = null } = found;
  const judged = view.judged.get(id);
  const facts = Object.entries(metadata ?? {}).map(([name, value]) => [
    textElement("dt", "", name),
    textElement("dd", "", typeof value === "string" ? value : JSON.stringify(value)),
  ]);
  body.replaceChildren(...[
    problem ? element("p", { role: "alert" }, problem) : null,
    judged ? element("p", {}, drawBadge(judged)) : null,
    ranksTable(id, view.stages),
    facts.length ? element("dl", {}, facts.flat()) : null,
    passage && text !== null ? element("p", { className: "place" }, describePlace(found)) : null,
    text === null ? null : textElement("div", "text", text, wholeText(found)),
  ].filter((child) => child !== null));
}

function ranksTable(id, stages) {
  const rows = stages.map((stage) => {
    const [rank, score] = [stage.ranks.get(id), stage.scores.get(id)];
    const cells = rank === undefined ? ["–", "not found"] : [String(rank), shownScore(score)];
    return element("tr", {}, element("th", { scope: "row" }, textElement("bdi", "", nameOfStage(stage))), cells.map((cell) => element("td", {}, cell)));
  });
  const head = ["stage", "rank", "score"].map((name) => element("th", { scope: "col" }, name));
  return element("table", { className: "ranks-of-stages" }, element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows));
}
