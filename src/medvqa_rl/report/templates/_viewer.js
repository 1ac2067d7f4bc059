/* Two browsers on one page: answers of evaluations, and groups of completions sampled during training. Their data is
   inside the page, or asked for at an address of the server that the page comes from. */
(() => {
  const PAGE = data.pageSize;
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN);

  // --- a browser: its controls, pages and part of the address --------------------------------------------------------

  const browsers = [];

  /* Makes a browser of the controls whose ids begin with the prefix. find(state) returns, perhaps later, the entries of
     the state's page, how many match, and of how many. */
  function browse(prefix, defaults, find) {
    const $ = (id) => document.getElementById(prefix + id);
    if (!$("entries")) return;
    const section = $("entries").closest("section"), state = { ...defaults, page: "1" };
    let latest = 0;

    function read(given) {
      for (const name of Object.keys(state)) {
        state[name] = given.get(prefix + name) ?? defaults[name] ?? "1";
        if ($(name) && name !== "page") $(name).value = state[name];
      }
    }
    function change(changes) {
      Object.assign(state, { page: "1" }, changes);
      history.replaceState(null, "", "#" + new URLSearchParams(browsers.flatMap((one) => one.set())));
      return show();
    }
    async function show() {
      const ticket = ++latest;
      if (!$("where").textContent) $("where").textContent = "Loading …";
      let found, problem = "No question matches: relax the search or the filters.";
      try {
        found = await find(state);
      } catch (error) {
        found = { entries: [], matching: 0, total: 0 };
        problem = error.message;
      }
      if (ticket !== latest) return; // another choice was made meanwhile
      const pages = Math.max(1, Math.ceil(found.matching / PAGE));
      const page = clamp(state.page, found.matching);
      state.page = String(page);
      $("entries").replaceChildren(...found.entries);
      $("where").textContent = found.matching
        ? "Page " + page + " of " + pages + " · " + found.matching + " of " + found.total + " questions"
        : problem;
      $("previous").disabled = page <= 1;
      $("next").disabled = page >= pages;
      if (found.notes) $("notes").replaceChildren(...found.notes.map((note) => make("p", "muted", note)));
    }
    async function turn(by) {
      if ($(by > 0 ? "next" : "previous").disabled) return;
      await change({ page: String(Number(state.page) + by) });
      section.scrollIntoView();
    }
    function step(by) {
      const entries = [...$("entries").children];
      const next = entries[entries.indexOf(document.activeElement?.closest(".entry")) + by];
      if (next) { next.focus(); next.scrollIntoView({ block: "start" }); }
    }
    for (const name of Object.keys(defaults)) {
      $(name)?.addEventListener("input", (event) => change({ [name]: event.target.value }));
    }
    $("previous").addEventListener("click", () => turn(-1));
    $("next").addEventListener("click", () => turn(1));
    browsers.push({
      section, read, show,
      set: () => Object.entries(state)
        .filter(([name, value]) => value !== (defaults[name] ?? "1"))
        .map(([name, value]) => [prefix + name, value]),
      keys: { "/": () => $("q").focus(), j: () => step(1), k: () => step(-1), n: () => turn(1), p: () => turn(-1) },
    });
  }
  const clamp = (page, matching) =>
    Math.min(Math.max(1, Math.ceil(matching / PAGE)), Math.max(1, parseInt(page, 10) || 1));

  /* The part of all that match which a page shows. */
  function cut(matching, total, state, draw) {
    const first = (clamp(state.page, matching.length) - 1) * PAGE;
    return { entries: matching.slice(first, first + PAGE).map(draw), matching: matching.length, total };
  }

  // --- answers of evaluations ----------------------------------------------------------------------------------------

  const FLIPS = {
    changed: (before, after) => before !== after,
    gained: (before, after) => before === "wrong" && after === "right",
    lost: (before, after) => before === "right" && after === "wrong",
  };
  const scored = (answer) => (answer.outcome === "none" ? "wrong" : answer.outcome);

  function wanted(question, state) {
    const answer = question.answers[state.eval], other = question.answers[state.against];
    if (!answer || (state.against && !other)) return false;
    const text = [question.id, question.question, question.gold, ...question.options, answer.text, other?.text ?? ""];
    const [after, before] = [answer, other ?? answer].map(scored);
    return (!state.outcome || answer.outcome === state.outcome)
      && (!state.flip || (before !== "unscored" && after !== "unscored" && (FLIPS[state.flip]?.(before, after) ?? false)))
      && (!state.group || Object.entries(question.tags).some((tag) => tag.join(": ") === state.group))
      && answer.vote.toLowerCase().startsWith(state.answer.trim().toLowerCase())
      && wordsOf(state.q).every((word) => text.join("\n").toLowerCase().includes(word));
  }

  function drawAnswer(name, answer) {
    const facts = [name, answer.vote ? "answer " + answer.vote : "", answer.tokens + " tokens" + (answer.cut ? ", truncated" : "")];
    const box = drawBox(answer.outcome, [...facts, listed(answer.parts)].filter(Boolean), answer.text);
    for (const line of [answer.why, answer.sampled]) if (line) box.append(make("p", "muted", line));
    return box;
  }

  function drawQuestion(question, state) {
    const names = [state.against, state.eval].filter((name) => question.answers[name]);
    const outcomes = names.map((name) => OUTCOMES[question.answers[name].outcome]);
    return drawEntry(question, outcomes.join(" → "), names.map((name) => drawAnswer(name, question.answers[name])));
  }

  const lastEvaluation = data.evaluations.at(-1) ?? "";
  browse("a-", { q: "", eval: lastEvaluation, against: data.against, outcome: "", flip: "", group: "", answer: "" }, async (state) => {
    const flip = document.getElementById("a-flip");
    if (flip) flip.disabled = !state.against;
    if (!data.answersFrom) {
      const matching = data.questions.filter((question) => wanted(question, state));
      const total = data.questions.filter((question) => question.answers[state.eval]).length;
      return cut(matching, total, state, (question) => drawQuestion(question, state));
    }
    const found = await load(data.answersFrom + "&" + new URLSearchParams(state));
    return { ...found, entries: found.entries.map((question) => drawQuestion(question, state)) };
  });

  // --- groups sampled during training --------------------------------------------------------------------------------

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

  function measure(group) {
    const rewards = group.completions.map((c) => c.reward).filter((r) => r !== null);
    group.mean = mean(rewards);
    group.spread = rewards.length ? Math.max(...rewards) - Math.min(...rewards) : 0;
    group.length = mean(group.completions.map((c) => c.tokens));
    group.words = [group.id, group.question, group.gold, ...group.options, ...group.completions.map((c) => c.text)]
      .join("\n").toLowerCase();
  }

  function choices(id, values) {
    const select = document.getElementById(id);
    if (!select) return;
    select.append(new Option("all", ""), ...values.map(([value, text]) => new Option(text, value)));
    select.parentElement.hidden = values.length < 2;
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
    const advantage = make("span", "", "advantage " + (completion.advantage > 0 ? "+" : "") + number(completion.advantage));
    advantage.append(bar(completion.advantage, scale));
    const parts = listed(completion.rewards);
    const reward = "reward " + number(completion.reward) + (parts ? " (" + parts + ")" : "");
    const tokens = completion.tokens + " tokens" + (completion.cut ? ", truncated" : "");
    return drawBox(completion.outcome, [advantage, reward, tokens], completion.text);
  }

  function drawGroup(group, fits) {
    const right = group.completions.filter((c) => c.outcome === "right").length;
    const place = (runs.length > 1 ? runs[group.run] + ", " : "") + "step " + group.step;
    const shown = group.completions.filter(fits);
    const count = shown.length < group.completions.length ? " · " + shown.length + " shown" : "";
    const scale = Math.max(...group.completions.map((c) => Math.abs(c.advantage))) || 1;
    const summary = place + " · " + right + " of " + group.completions.length + " correct" + count;
    return drawEntry(group, summary, shown.map((completion) => drawCompletion(completion, scale)));
  }

  function browseGroups(groups) {
    groups.forEach(measure);
    const tagged = (name) => [...new Set(groups.map((g) => g.tags[name]).filter(Boolean))].sort().map((v) => [v, v]);
    choices("modality", tagged("modality"));
    choices("family", tagged("family"));
    choices("run", runs.map((name, index) => [String(index), name]));
    browse("", { q: "", outcome: "", run: "", modality: "", family: "", sort: "mixed" }, (state) => {
      const fits = (completion) => !state.outcome || completion.outcome === state.outcome;
      const matching = groups
        .filter((g) => (!state.run || String(g.run) === state.run)
          && (!state.modality || g.tags.modality === state.modality)
          && (!state.family || g.tags.family === state.family)
          && g.completions.some(fits)
          && wordsOf(state.q).every((word) => g.words.includes(word)))
        .sort(ORDERS[state.sort] ?? ORDERS.mixed);
      return cut(matching, groups.length, state, (group) => drawGroup(group, fits));
    });
  }

  // --- start ---------------------------------------------------------------------------------------------------------

  function readAddress() {
    if (location.hash && !location.hash.includes("=")) return; // a link to a section
    const given = new URLSearchParams(location.hash.slice(1));
    for (const one of browsers) one.read(given);
  }
  addEventListener("hashchange", () => { readAddress(); browsers.forEach((one) => one.show()); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    // The browser that has the focus, else the one in the middle of the window, else the first.
    const holds = (one) => one.section.contains(document.activeElement);
    const seen = (one) => one.section.getBoundingClientRect().top < innerHeight / 2;
    const action = (browsers.find(holds) ?? browsers.findLast(seen) ?? browsers[0])?.keys[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  async function start() {
    readAddress();
    browsers.forEach((one) => one.show());
    const notes = document.getElementById("notes");
    if (data.groupsFrom && notes) {
      const found = await load(data.groupsFrom).catch((error) => ({ groups: [], images: {}, notes: [error.message] }));
      Object.assign(images, found.images);
      data.groups = found.groups;
      notes.append(...found.notes.map((note) => make("p", "muted", note)));
    }
    browseGroups(data.groups);
    readAddress();
    browsers.at(-1)?.show();
  }
  start();
})();
