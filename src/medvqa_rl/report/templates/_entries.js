"use strict";
/* What all pages with questions share: the page's data, and how a question and an answer are drawn. */
const data = JSON.parse(document.getElementById("data").textContent);
const { runs, images, tags, answerTags } = data;
const TAG = new RegExp("(" + tags.map((tag) => tag.replace(/[^\w\s]/g, "\\$&")).join("|") + ")");
const OUTCOMES = { right: "correct", wrong: "wrong", none: "no answer", unscored: "unscored", answered: "answer" };
const number = (value) => (value === null ? "unscored" : String(Math.round(value * 100) / 100).replace("-", "−"));
const listed = (parts) => parts.map(([name, value]) => name + " " + number(value)).join(", ");
const wordsOf = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

/* Creates an element with text, which is never parsed as HTML. */
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function load(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

// --- what is shown of a question -----------------------------------------------------------------------------------

function drawText(text) {
  const element = make("div", "text");
  let kind = "";
  for (const piece of text.split(TAG)) {
    const isTag = tags.includes(piece);
    if (isTag) kind = answerTags.includes(piece) ? "answer" : "";
    if (piece) element.append(make("span", isTag ? "tag" : kind, piece));
  }
  return element;
}

function drawBox(outcome, facts, text) {
  const box = make("div", "completion " + outcome), header = make("header");
  header.append(make("b", "", OUTCOMES[outcome]), ...facts.map((f) => (f instanceof Node ? f : make("span", "", f))));
  box.append(header, drawText(text));
  return box;
}

function drawEntry(question, summary, boxes) {
  const entry = make("article", "entry");
  entry.tabIndex = -1;
  const body = make("div", "group"), side = make("div"), list = make("ol", "options"), answers = make("div");
  const pictures = make("div", "images");
  question.images.forEach((key, index) => {
    const image = make("img");
    image.src = images[key] ?? key;
    image.alt = "Image " + (index + 1) + " of the question";
    pictures.append(image);
  });
  if (question.images.length) side.append(pictures);
  for (const option of question.options) list.append(make("li", option === question.gold ? "gold" : "", option));
  if (question.options.length) side.append(list);
  const gold = make("p", "", question.options.length || !question.gold ? "" : "Gold answer: ");
  if (!question.options.includes(question.gold)) gold.append(make("span", "gold", question.gold));
  const notes = Object.entries(question.tags).map(([name, value]) => name.replaceAll("_", " ") + ": " + value);
  if (gold.textContent) side.append(gold);
  if (question.id) side.append(make("p", "muted tags", [...notes, "id: " + question.id].join(" · ")));
  if (question.ask) {
    const link = make("a", "", "Ask about this image");
    link.href = question.ask;
    side.append(link);
  }
  answers.append(...boxes);
  body.append(side, answers);
  entry.append(make("h3", "", question.question), make("p", "muted", summary), body);
  return entry;
}
