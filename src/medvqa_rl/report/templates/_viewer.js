"use strict";
(() => {
  const { runs, groups, images, tags, answerTags } = JSON.parse(document.getElementById("data").textContent);
  const TAG = new RegExp("(" + tags.map((tag) => tag.replace(/[^\w\s]/g, "\\$&")).join("|") + ")");
  const PAGE = 10;
  const DEFAULTS = { q: "", outcome: "", run: "", modality: "", family: "", sort: "mixed", page: "1" };
  const $ = (id) => document.getElementById(id);
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN);
  const OUTCOMES = { right: "correct", wrong: "wrong", none: "no answer" };

  for (const group of groups) {
    const rewards = group.completions.map((c) => c.reward).filter((r) => r !== null);
    group.mean = mean(rewards);
    group.spread = rewards.length ? Math.max(...rewards) - Math.min(...rewards) : 0;
    group.length = mean(group.completions.map((c) => c.tokens));
    group.words = [group.id, group.question, group.gold, ...group.options, ...group.completions.map((c) => c.text)]
      .join("\n").toLowerCase();
  }
  const last = (value) => (Number.isNaN(value) ? -Infinity : value);
  const ORDERS = {
    mixed: (a, b) => (b.spread > 0) - (a.spread > 0) || b.step - a.step, // equal rewards teach nothing
    new: (a, b) => b.step - a.step,
    old: (a, b) => a.step - b.step,
    best: (a, b) => last(b.mean) - last(a.mean),
    worst: (a, b) => last(a.mean) - last(b.mean),
    spread: (a, b) => b.spread - a.spread,
    long: (a, b) => b.length - a.length,
    short: (a, b) => a.length - b.length,
  };

  /* Creates an element with text, which is never parsed as HTML. */
  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function choices(id, values) {
    const select = $(id);
    if (!select) return;
    select.append(new Option("all", ""), ...values.map(([value, text]) => new Option(text, value)));
    select.parentElement.hidden = values.length < 2;
  }
  const tagged = (name) => [...new Set(groups.map((g) => g.tags[name]).filter(Boolean))].sort().map((v) => [v, v]);
  choices("modality", tagged("modality"));
  choices("family", tagged("family"));
  choices("run", runs.map((name, index) => [String(index), name]));

  const state = { ...DEFAULTS };
  function readHash() {
    if (location.hash && !location.hash.includes("=")) return; // a link to a section
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) ?? DEFAULTS[name];
    for (const name of Object.keys(DEFAULTS)) {
      if (name !== "page" && $(name)) $(name).value = state[name];
    }
    if (!ORDERS[state.sort]) state.sort = DEFAULTS.sort;
  }
  function change(changes) {
    Object.assign(state, { page: "1" }, changes);
    const set = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
    history.replaceState(null, "", "#" + new URLSearchParams(set));
    show();
  }

  const fits = (completion) => !state.outcome || completion.outcome === state.outcome;
  function found() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    return groups
      .filter((g) => (!state.run || String(g.run) === state.run)
        && (!state.modality || g.tags.modality === state.modality)
        && (!state.family || g.tags.family === state.family)
        && g.completions.some(fits)
        && words.every((word) => g.words.includes(word)))
      .sort(ORDERS[state.sort]);
  }

  function bar(advantage, scale) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const shape = (name, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      svg.append(element);
    };
    svg.setAttribute("class", "bar");
    svg.setAttribute("viewBox", "-50 0 100 10");
    svg.setAttribute("aria-hidden", "true");
    const width = (50 * advantage) / scale;
    shape("line", { x1: 0, x2: 0, y1: 0, y2: 10 });
    shape("rect", { x: Math.min(0, width), y: 2, width: Math.abs(width), height: 6, class: width > 0 ? "up" : "down" });
    return svg;
  }

  function drawCompletion(completion, scale) {
    const box = make("div", "completion " + completion.outcome);
    const header = make("header");
    const number = (value) => (value === null ? "unscored" : String(Math.round(value * 100) / 100).replace("-", "−"));
    const sign = completion.advantage > 0 ? "+" : "";
    const advantage = make("span", "", "advantage " + sign + number(completion.advantage));
    advantage.append(bar(completion.advantage, scale));
    const parts = completion.rewards.map(([name, value]) => name + " " + number(value)).join(", ");
    header.append(
      make("b", "", OUTCOMES[completion.outcome]),
      advantage,
      make("span", "", "reward " + number(completion.reward) + (parts ? " (" + parts + ")" : "")),
      make("span", "", completion.tokens + " tokens" + (completion.cut ? ", truncated" : "")),
    );
    const text = make("div", "text");
    let kind = "";
    for (const piece of completion.text.split(TAG)) {
      const isTag = tags.includes(piece);
      if (isTag) kind = answerTags.includes(piece) ? "answer" : "";
      if (piece) text.append(make("span", isTag ? "tag" : kind, piece));
    }
    box.append(header, text);
    return box;
  }

  function drawGroup(group) {
    const entry = make("article", "entry");
    entry.tabIndex = -1;
    const right = group.completions.filter((c) => c.outcome === "right").length;
    const place = (runs.length > 1 ? runs[group.run] + ", " : "") + "step " + group.step;
    const shown = group.completions.filter(fits);
    const count = shown.length < group.completions.length ? " · " + shown.length + " shown" : "";
    const body = make("div", "group"), side = make("div"), list = make("ol", "options"), answers = make("div");
    const pictures = make("div", "images");
    group.images.forEach((key, index) => {
      const image = make("img");
      image.src = images[key];
      image.alt = "Image " + (index + 1) + " of the question";
      pictures.append(image);
    });
    if (group.images.length) side.append(pictures);
    for (const option of group.options) list.append(make("li", option === group.gold ? "gold" : "", option));
    if (group.options.length) side.append(list);
    const gold = make("p", "", group.options.length ? "" : "Gold answer: ");
    if (!group.options.includes(group.gold)) gold.append(make("span", "gold", group.gold));
    const tags = Object.entries(group.tags).map(([name, value]) => name.replaceAll("_", " ") + ": " + value);
    if (gold.textContent) side.append(gold);
    side.append(make("p", "muted tags", [...tags, "id: " + group.id].join(" · ")));
    const scale = Math.max(...group.completions.map((c) => Math.abs(c.advantage))) || 1;
    answers.append(...shown.map((completion) => drawCompletion(completion, scale)));
    body.append(side, answers);
    const summary = place + " · " + right + " of " + group.completions.length + " correct" + count;
    entry.append(make("h3", "", group.question), make("p", "muted", summary), body);
    return entry;
  }

  function show() {
    const matching = found();
    const pages = Math.max(1, Math.ceil(matching.length / PAGE));
    const page = Math.min(pages, Math.max(1, parseInt(state.page, 10) || 1));
    state.page = String(page);
    $("entries").replaceChildren(...matching.slice((page - 1) * PAGE, page * PAGE).map(drawGroup));
    $("where").textContent = matching.length
      ? "Page " + page + " of " + pages + " · " + matching.length + " of " + groups.length + " questions"
      : "No question matches: relax the search or the filters.";
    $("previous").disabled = page <= 1;
    $("next").disabled = page >= pages;
  }

  function turn(by) {
    if ($(by > 0 ? "next" : "previous").disabled) return;
    change({ page: String(Number(state.page) + by) });
    $("samples").scrollIntoView();
  }
  function step(by) {
    const entries = [...$("entries").children];
    const next = entries[entries.indexOf(document.activeElement?.closest(".entry")) + by];
    if (next) { next.focus(); next.scrollIntoView({ block: "start" }); }
  }

  for (const name of Object.keys(DEFAULTS)) {
    if (name !== "page") $(name)?.addEventListener("input", (event) => change({ [name]: event.target.value }));
  }
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  addEventListener("hashchange", () => { readHash(); show(); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const actions = { "/": () => $("q").focus(), j: () => step(1), k: () => step(-1), n: () => turn(1), p: () => turn(-1) };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  });
  readHash();
  show();
})();
