"use strict";

const part = (id) => document.getElementById(id);
const form = part("form"), text = part("text"), image = part("image");
let asked = 0; // Answers to earlier queries are dropped.

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

function item(name, value, share, more = "") {
  const row = document.createElement("li"), label = document.createElement("span");
  const number = document.createElement("output"), small = document.createElement("small");
  label.textContent = name;
  number.textContent = value;
  small.textContent = more;
  label.append(small);
  row.style.setProperty("--share", Math.max(0, Math.min(1, share)));
  row.append(label, number);
  return row;
}

// Where the score of a label comes from.
function parts(label) {
  const of = (name, value) => value == null ? [] : [`${name} ${value.toFixed(2)}`];
  const change = label.neighbours;
  return [
    ...of("prototype", label.prototype),
    ...of("head", label.head),
    ...(change == null ? [] : [`neighbours ${change < 0 ? "" : "+"}${change.toFixed(4)}`]),
  ].join(" · ");
}

// The query without each of its words, and without its images.
function variants(query) {
  const words = query.text.split(/\s+/).filter(Boolean).slice(0, 30), found = [];
  words.forEach((word, i) => {
    const rest = words.filter((_, j) => j !== i).join(" ");
    if (rest || query.images.length) found.push([word, { text: rest, images: query.images }]);
  });
  if (query.images.length && words.length) found.push(["images", { text: query.text }]);
  return found;
}

async function ask(event) {
  event.preventDefault();
  const turn = ++asked;
  part("error").textContent = "";
  try {
    const images = await Promise.all([...image.files].map(base64));
    const query = { text: text.value, images };
    const result = await post("/explain", { query, k: Number(part("k").value) });
    if (turn !== asked) return;
    const first = result.labels[0];
    part("labels").replaceChildren(...result.labels.map((label) =>
      item(label.text || label.id, label.score.toFixed(4), label.score / (first.score || 1),
        parts(label))));
    part("near").replaceChildren(...result.neighbours.map((near) =>
      item(near.text ?? "a training query", near.similarity.toFixed(2), near.similarity,
        near.labels.join(", "))));
    part("neighbours").hidden = !result.neighbours.length;
    part("note").textContent = result.note || (first ? "" : "No label was found.");
    part("parts").replaceChildren();
    part("answer").hidden = false;
    const others = variants(query);
    if (!first || !others.length) return;
    const queries = others.map(([, other]) => other);
    const found = (await post("/predict", { queries, k: 100 })).results;
    if (turn !== asked) return;
    const falls = others.map(([name], i) => {
      const same = found[i].labels.find((label) => label.id === first.id);
      return [name, first.score - (same ? same.score : 0)];
    });
    part("parts").replaceChildren(...falls.map(([name, fall]) =>
      item(name, fall.toFixed(4), fall / (Math.abs(first.score) || 1))));
  } catch (error) {
    if (turn === asked) part("error").textContent = error.message;
  }
}

async function connect() {
  const state = await (await fetch("/readyz")).json();
  part("about").textContent = state.ready
    ? `${state.workdir}: ${state.num_labels.toLocaleString()} labels, model of step ${state.step}`
    : state.reason;
  if (!state.ready) setTimeout(connect, 1000);
}

form.addEventListener("submit", ask);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) form.requestSubmit(), event.preventDefault();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    part("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") image.files = event.dataTransfer.files;
  });
}
connect();
