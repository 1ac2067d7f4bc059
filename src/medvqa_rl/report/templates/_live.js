/* Keeps a page of the server up to date: what is marked data-live is replaced when the server has newer content. */
(() => {
  const SECONDS = 3;
  const GONE = document.getElementById("gone").textContent;
  let version = "";

  async function refresh() {
    if (document.hidden) return;
    const note = document.getElementById("gone");
    let response;
    try {
      response = await fetch(location.pathname + location.search, { headers: { "If-None-Match": version } });
    } catch {
      response = { ok: false, status: 0 };
    }
    note.hidden = response.ok || response.status === 304;
    if (!note.hidden) note.textContent = response.status ? await response.text() : GONE;
    if (!response.ok) return;
    version = response.headers.get("ETag");
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    const isNew = (id) => fresh.getElementById(id) && !document.getElementById(id);
    if (["entries", "a-entries"].some(isNew)) return location.reload(); // the first samples have come
    for (const part of document.querySelectorAll("[data-live]")) replace(part, fresh.getElementById(part.id));
    for (const select of document.querySelectorAll("select[data-live-options]")) {
      const value = select.value;
      select.replaceChildren(...(fresh.getElementById(select.id)?.children ?? []));
      select.value = value;
    }
  }

  /* Replaces a part, and keeps what is checked, unfolded and in focus. */
  function replace(part, newer) {
    if (!newer) return;
    const WITH_STATE = "input, a, summary, details, .scroll";
    const [before, after] = [part, newer].map((one) => [...one.querySelectorAll(WITH_STATE)]);
    const checked = new Set(before.filter((one) => one.checked).map((one) => one.value));
    const focus = before.indexOf(document.activeElement);
    after.forEach((one, index) => {
      if (one.type === "checkbox") one.checked = checked.has(one.value);
      if (one.matches("details")) one.open = before[index]?.open ?? false;
    });
    part.replaceWith(newer);
    after[focus]?.focus({ preventScroll: true });
    after.forEach((one, index) => { one.scrollLeft = before[index]?.scrollLeft ?? 0; });
  }

  async function follow() {
    await refresh();
    setTimeout(follow, 1000 * SECONDS);
  }
  setTimeout(follow, 1000 * SECONDS);
})();
