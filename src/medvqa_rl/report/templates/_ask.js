/* Sends a question and shows the answers with their votes and reward parts. */
(() => {
  const form = document.getElementById("ask"), state = document.getElementById("state");
  const answers = document.getElementById("answers");

  function drawAnswer(answer) {
    const tokens = answer.tokens + " tokens" + (answer.cut ? ", truncated" : "");
    const vote = answer.outcome === "none" ? "" : "answer " + answer.vote;
    return drawBox(answer.outcome, [vote, tokens, listed(answer.parts)].filter(Boolean), answer.text);
  }

  function drawVotes(votes, count) {
    const list = make("ol", "votes");
    for (const [vote, number] of votes) {
      const item = make("li", "", number + " of " + count + "  " + vote), bar = make("meter");
      Object.assign(bar, { min: 0, max: count, value: number, ariaLabel: "Share of votes" });
      item.prepend(bar);
      list.append(item);
    }
    return list;
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button"), image = form.elements.image.files[0];
    const start = performance.now();
    const tick = () => {
      const seconds = Math.round((performance.now() - start) / 1000);
      state.textContent = "Answering … " + seconds + " s. The first question loads the model.";
    };
    const timer = setInterval(tick, 1000);
    tick();
    button.disabled = true;
    try {
      const response = await fetch(data.send, { method: "POST", body: new FormData(form) });
      if (!response.ok) throw new Error(await response.text());
      const found = await response.json();
      const shown = document.querySelectorAll("#ask .images img");
      found.images = image ? [] : [...shown].map((one) => one.getAttribute("src"));
      const notes = found.notes.map((note) => make("p", "muted", note));
      const entry = drawEntry(found, "", found.answers.map(drawAnswer));
      entry.querySelector("h3").after(drawVotes(found.votes, found.answers.length), ...notes);
      answers.replaceChildren(entry);
      state.textContent = "";
    } catch (error) {
      answers.replaceChildren();
      state.textContent = error instanceof TypeError ? "The server does not answer: it may have been stopped." : error.message;
    } finally {
      clearInterval(timer);
      button.disabled = false;
    }
  });
})();
