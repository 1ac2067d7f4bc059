"use strict";
(() => {
  const { format, sheet, items, images } = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const PLACE = `medvqa-rl sheet ${sheet}`;
  const form = $("form");
  const state = { rater: "", ratings: {} }; // of each item that was touched: correct and reasoning as chosen, comment
  let current = 0;

  function tell(sentence) {
    $("problem").textContent = sentence;
    $("problem").hidden = !sentence;
  }

  /* Kept in the browser, so that a closed tab loses nothing. A browser may refuse; then only this tab has it. */
  function restore() {
    try {
      const kept = JSON.parse(localStorage.getItem(PLACE) ?? "null");
      if (kept) {
        state.rater = String(kept.rater ?? "");
        for (const { id } of items) {
          const { correct = "", reasoning = "", comment = "" } = kept.ratings?.[id] ?? {};
          if (correct || reasoning || comment) state.ratings[id] = { correct, reasoning, comment };
        }
      }
    } catch {
      tell("This browser keeps nothing for this page: save before you close it.");
    }
  }
  function keep() {
    try {
      localStorage.setItem(PLACE, JSON.stringify(state));
    } catch {
      tell("This browser keeps nothing for this page: save before you close it.");
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

  function show(place) {
    current = Math.min(Math.max(place, 0), items.length - 1);
    const item = items[current];
    $("where").textContent = `Answer ${current + 1} of ${items.length}`;
    $("previous").disabled = current === 0;
    $("next").disabled = current === items.length - 1;
    for (const name of ["question", "gold"]) $(name).textContent = item[name];
    $("reasoning").textContent = item.reasoning || "(none)";
    $("answer").textContent = item.answer || "(none could be read)";
    $("options").replaceChildren(
      ...item.options.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
    $("images").replaceChildren(
      ...item.images.map((name, index) =>
        Object.assign(document.createElement("img"), { src: images[name], alt: `Image ${index + 1} of the question` }),
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
    keep();
    count();
  }

  function go(place) {
    show(place);
    $("item").focus({ preventScroll: true });
    $("item").scrollIntoView({ block: "nearest" });
  }

  function firstUnrated() {
    const place = items.findIndex(({ id }) => !rated(id));
    if (place >= 0) go(place);
  }

  /* Asks by its own label, for the next rater must not see what the last one said. */
  function forget(event) {
    const button = event.target;
    if (button.textContent === "New rater") {
      button.textContent = "Click again to clear the form: save first";
      return;
    }
    button.textContent = "New rater";
    Object.assign(state, { rater: "", ratings: {} });
    $("rater").value = "";
    tell("");
    keep();
    go(0);
  }

  const known = (value, read) => (value === "" || value === "unknown" ? null : read(value));
  function save() {
    if (!state.rater.trim()) {
      tell("Write your name or number first, so that raters can be told apart.");
      $("rater").focus();
      return;
    }
    // An item counts once both questions are answered, if only by "cannot tell".
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
    tell(left ? `Saved with ${left} still unrated: save again when they are done.` : "");
  }

  form.addEventListener("input", (event) => {
    const { name, value, id } = event.target;
    set(id === "comment" ? "comment" : name, value);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  $("rater").addEventListener("input", (event) => {
    state.rater = event.target.value;
    tell("");
    keep();
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
  const place = items.findIndex(({ id }) => !rated(id));
  if (place > 0) show(place);
})();
