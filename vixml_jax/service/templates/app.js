"use strict";

const part = (id) => document.getElementById(id);
const form = part("form"), text = part("text"), image = part("image");
let asked = 0; // Answers to earlier queries are dropped.

async function post(queries, k) {
  const response = await fetch("/predict", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ queries, k }),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer.results;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

function item(name, value, share) {
  const row = document.createElement("li"), label = document.createElement("span");
  const number = document.createElement("output");
  label.textContent = name;
  number.textContent = value;
  row.style.setProperty("--share", Math.max(0, Math.min(1, share)));
  row.append(label, number);
  return row;
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
    const [result] = await post([query], Number(part("k").value));
    if (turn !== asked) return;
    const first = result.labels[0];
    part("labels").replaceChildren(...result.labels.map((label) =>
      item(label.text || label.id, label.score.toFixed(4), label.score / (first.score || 1))));
    part("note").textContent = result.note || (first ? "" : "No label was found.");
    part("parts").replaceChildren();
    part("answer").hidden = false;
    const others = variants(query);
    if (!first || !others.length) return;
    const found = await post(others.map(([, other]) => other), 100);
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
