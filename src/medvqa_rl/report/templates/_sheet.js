"use strict";
(() => {
  const { format, sheet, items, images } = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const STORAGE_KEY = `medvqa-rl sheet ${sheet}`;
  const form = $("form");
  const state = { rater: "", ratings: {} }; // by item id: correct, reasoning, comment
  let current = 0;

  function notify(sentence) {
    $("problem").textContent = sentence;
    $("problem").hidden = !sentence;
  }

  /* Ratings are stored in the browser, so they survive closing the tab, unless the browser blocks storage. */
  function restore() {
    try {
      const stored = JSON.parse(localStorage.getItem(STORAGE_KEY) ?? "null");
      if (stored) {
        state.rater = String(stored.rater ?? "");
        for (const { id } of items) {
          const { correct = "", reasoning = "", comment = "" } = stored.ratings?.[id] ?? {};
          if (correct || reasoning || comment) state.ratings[id] = { correct, reasoning, comment };
        }
      }
    } catch {
      notify("This browser does not store data for this page: save before you close it.");
    }
  }
  function store() {
    try {
      localStorage.setItem(STORAGE_KEY, JSON.stringify(state));
    } catch {
      notify("This browser does not store data for this page: save before you close it.");
    }
  }

  const blank = () => ({ correct: "", reasoning: "", comment: "" });
  const rated = (id) => Boolean(state.ratings[id]?.correct && state.ratings[id]?.reasoning);

  function count() {
    const done = items.filter(({ id }) => rated(id)).length;
    $("progress").value = done;
    $("done").textContent = `${done} of ${items.length} rated`;
    $("first").disabled = done === items.length;
    const own = state.ratings[items[current].id] ?? blank();
    for (const field of form.querySelectorAll("fieldset")) {
      field.classList.toggle("done", Boolean(own[field.querySelector("input").name]));
    }
  }

  function show(index) {
    current = Math.min(Math.max(index, 0), items.length - 1);
    const item = items[current];
    $("where").textContent = `Answer ${current + 1} of ${items.length}`;
    $("previous").disabled = current === 0;
    $("next").disabled = current === items.length - 1;
    for (const name of ["question", "gold"]) $(name).textContent = item[name];
    $("reasoning").textContent = item.reasoning || "(none)";
    $("answer").textContent = item.answer || "(none could be parsed)";
    $("options").replaceChildren(
      ...item.options.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
    $("images").replaceChildren(
      ...item.images.map((name, number) =>
        Object.assign(document.createElement("img"), { src: images[name], alt: `Image ${number + 1} of the question` }),
      ),
    );
    document.querySelector(".item").classList.toggle("plain", !item.images.length);
    const own = state.ratings[item.id] ?? blank();
    for (const input of form.querySelectorAll("input")) input.checked = own[input.name] === input.value;
    $("comment").value = own.comment;
    count();
  }

  function set(name, value) {
    const { id } = items[current];
    state.ratings[id] = { ...(state.ratings[id] ?? blank()), [name]: value };
    for (const input of form.querySelectorAll(`input[name="${name}"]`)) input.checked = input.value === value;
    store();
    count();
  }

  function go(index) {
    show(index);
    $("item").focus({ preventScroll: true });
    $("item").scrollIntoView({ block: "nearest" });
  }

  function firstUnrated() {
    const index = items.findIndex(({ id }) => !rated(id));
    if (index >= 0) go(index);
  }

  /* Clears all ratings after a second click; the next rater must not see them. */
  function forget(event) {
    const button = event.target;
    if (button.textContent === "New rater") {
      button.textContent = "Save first, then click again to clear the form";
      return;
    }
    button.textContent = "New rater";
    Object.assign(state, { rater: "", ratings: {} });
    $("rater").value = "";
    notify("");
    store();
    go(0);
  }

  const known = (value, read) => (value === "" || value === "unknown" ? null : read(value));
  function save() {
    if (!state.rater.trim()) {
      notify("Enter your name or ID first, so that raters can be told apart.");
      $("rater").focus();
      return;
    }
    // An item is rated once both questions are answered, including with "cannot tell".
    const ratings = items.filter(({ id }) => rated(id)).map(({ id }) => ({
      item: id,
      correct: known(state.ratings[id].correct, (value) => value === "yes"),
      reasoning: known(state.ratings[id].reasoning, Number),
      comment: state.ratings[id].comment,
    }));
    const text = JSON.stringify({ format, sheet, rater: state.rater.trim(), ratings }, null, 2);
    const name = state.rater.trim().replace(/[^\p{L}\p{N}_-]+/gu, "-");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text + "\n"], { type: "application/json" }));
    link.download = `ratings-${name}-${sheet}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    const left = items.length - ratings.length;
    notify(left ? `Saved with ${left} still unrated: save again when you have rated them.` : "");
  }

  form.addEventListener("input", (event) => {
    const { name, value, id } = event.target;
    set(id === "comment" ? "comment" : name, value);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  $("rater").addEventListener("input", (event) => {
    state.rater = event.target.value;
    notify("");
    store();
  });
  $("previous").addEventListener("click", () => go(current - 1));
  $("next").addEventListener("click", () => go(current + 1));
  $("first").addEventListener("click", firstUnrated);
  $("save").addEventListener("click", save);
  $("forget").addEventListener("click", forget);

  const KEYS = {
    y: () => set("correct", "yes"),
    n: () => set("correct", "no"),
    u: () => set("correct", "unknown"),
    x: () => set("reasoning", "unknown"),
    j: () => go(current + 1),
    k: () => go(current - 1),
    f: firstUnrated,
    c: () => $("comment").focus(),
  };
  for (const score of "0123") KEYS[score] = () => set("reasoning", score);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("textarea, input:not([type=radio])")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (Object.hasOwn(KEYS, event.key)) {
      KEYS[event.key]();
      event.preventDefault();
    }
  });

  restore();
  $("rater").value = state.rater;
  show(0);
  const index = items.findIndex(({ id }) => !rated(id));
  if (index > 0) show(index);
})();
