// The search page of a server: the form, the address that keeps a query, requests, and errors in words.
"use strict";

const TOKEN = "rag_retrieval_token"; // in sessionStorage, which ends with the tab
const DEFAULT_TOP_K = "10";
const PROBLEMS = {
  404: "This is not here",
  413: "The request is too large",
  422: "The request is refused",
  429: "The server is busy",
  500: "The server failed",
  503: "The server takes no requests at present",
  504: "The answer took too long",
};
const WORTH_A_RETRY = [null, 429, 500, 503, 504];

const form = Object.fromEntries(
  ["search", "query", "top_k", "where", "options", "token-form", "token", "status", "problem", "found"].map((id) => [
    id.replace("-", "_"), document.getElementById(id),
  ]),
);
let current = null; // the AbortController of the newest search
let countdown = null; // of the retry button

// status: of the answer, null where none came. retryAfter: seconds.
class Problem extends Error {
  constructor(message, status, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// The JSON that the server answers. Paths are relative, so that a proxy may serve all below a prefix.
async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  let response;
  let body;
  try {
    response = await fetch(path, { ...options, headers });
    body = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server could not be reached.", null);
  }
  if (!response.ok) throw problemOf(response, body, token);
  return JSON.parse(body);
}

function problemOf(response, body, token) {
  if (response.status === 401) {
    return new Problem(token ? "The server does not accept this token." : "This server asks for its token.", 401);
  }
  let said = response.statusText;
  try {
    const told = JSON.parse(body);
    said = told.message ?? told.error ?? said;
  } catch { /* a proxy that answers in HTML */ }
  const title = PROBLEMS[response.status] ?? `The server answered with status ${response.status}`;
  const seconds = Number(response.headers.get("Retry-After")) || 0;
  return new Problem(said ? `${title}: ${said}` : `${title}.`, response.status, seconds);
}

// ---- the address

function addressOfForm() {
  const values = new URLSearchParams({ q: form.query.value });
  if (form.top_k.value !== DEFAULT_TOP_K) values.set("top_k", form.top_k.value);
  if (form.where.value.trim()) values.set("where", form.where.value.trim());
  return `?${values}`;
}

function fillFormFromAddress() {
  const values = new URLSearchParams(location.search);
  form.query.value = values.get("q") ?? "";
  form.top_k.value = values.get("top_k") ?? DEFAULT_TOP_K;
  form.where.value = values.get("where") ?? "";
  if (form.where.value || form.top_k.value !== DEFAULT_TOP_K) form.options.open = true;
  if (form.query.value.trim()) search();
  else clear();
}

// ---- the search

function requestOfForm() {
  const request = { query: form.query.value, top_k: Number(form.top_k.value), stages: true };
  if (!form.where.value.trim()) return request;
  try {
    return { ...request, where: JSON.parse(form.where.value) };
  } catch (error) {
    throw new Problem(`The filter is no JSON (${error.message}); write it as {"language": "zh"}.`, 0);
  }
}

function clear() {
  current?.abort();
  clearInterval(countdown);
  form.status.textContent = "";
  form.problem.replaceChildren();
  form.found.replaceChildren();
  form.found.removeAttribute("aria-busy");
  form.token_form.hidden = true;
  document.title = "Search";
}

async function search() {
  current?.abort();
  clearInterval(countdown);
  const own = new AbortController();
  current = own;
  form.problem.replaceChildren();
  form.status.textContent = "searching …";
  form.found.setAttribute("aria-busy", "true");
  document.title = `${form.query.value} – Search`;
  const started = performance.now();
  try {
    const body = JSON.stringify(requestOfForm());
    const headers = { "Content-Type": "application/json" };
    const answer = await ask("search", { method: "POST", headers, body, signal: own.signal });
    if (current === own) show(answer, (performance.now() - started) / 1000);
  } catch (error) {
    if (current === own) showProblem(error);
  }
}

function show(answer, seconds) {
  form.token_form.hidden = true;
  form.found.removeAttribute("aria-busy");
  const count = answer.results.length;
  const documents = `${number(count)} ${count === 1 ? "document" : "documents"}`;
  const parts = [["encode_seconds", "the query"], ["filter_seconds", "the filter"]].filter(([key]) => key in answer);
  const times = parts.map(([key, name]) => `${name} ${shownTime(answer[key])}`).join(", ");
  const done = `${answer.model}: ${documents} in ${shownTime(seconds)}${times && `, of which ${times}`}`;
  form.status.textContent = [done, ...(answer.meta?.warnings ?? [])].join("; ");
  const load = (id) => ask(`documents/${encodeURIComponent(id)}`);
  const stages = drawStages([answer], { load, shown: Number(form.top_k.value) });
  form.found.replaceChildren(stages);
  stages.scrollLeft = stages.scrollWidth; // where there is not room for all, the result is what one sees first
}

function showProblem(error) {
  form.status.textContent = "";
  form.found.removeAttribute("aria-busy");
  form.found.replaceChildren();
  form.problem.replaceChildren(element("span", { dir: "auto" }, error.message));
  if (error.status === 401) {
    form.token_form.hidden = false;
    form.token.focus();
  }
  if (WORTH_A_RETRY.includes(error.status)) form.problem.append(" ", retryButton(error.retryAfter));
}

function retryButton(seconds) {
  const button = element("button", { type: "button" });
  button.addEventListener("click", search);
  const show = () => {
    button.disabled = seconds > 0;
    button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
    if (seconds <= 0) clearInterval(countdown);
    seconds -= 1;
  };
  countdown = setInterval(show, 1000);
  show();
  return button;
}

// ---- what a person does

form.search.addEventListener("submit", (event) => {
  event.preventDefault();
  const address = addressOfForm();
  if (address !== location.search) history.pushState(null, "", address);
  search();
});

form.token_form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!/^[\x21-\x7e]+$/.test(form.token.value)) {
    form.problem.textContent = "A token has visible ASCII characters and no spaces.";
    return;
  }
  sessionStorage.setItem(TOKEN, form.token.value);
  form.token.value = "";
  form.query.focus();
  search();
});

form.query.addEventListener("keydown", (event) => {
  // Enter that ends the composition of a Chinese word is no wish to search; 229 is what Safari sends after it
  if (event.key === "Enter" && (event.isComposing || event.keyCode === 229)) event.preventDefault();
  const first = form.found.querySelector(".hit[tabindex='0']");
  if (event.key === "ArrowDown" && !event.isComposing && first) {
    event.preventDefault();
    first.focus();
  }
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    form.query.select();
  }
  if (event.key === "Escape" && event.target.closest(".hit")) form.query.focus();
});

window.addEventListener("popstate", fillFormFromAddress);
fillFormFromAddress();
