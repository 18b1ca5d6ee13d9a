"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Colours: as the system has them, or as chosen. A file may have no storage: the choice is then for this view.
  const themes = ["auto", "light", "dark"];
  const button = byId("theme");
  let theme = "auto";
  const setTheme = (name) => {
    theme = themes.includes(name) ? name : "auto";
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[theme];
    button.setAttribute("aria-label", theme === "auto" ? "colours: as the system has them" : `colours: ${theme}`);
    try { localStorage.setItem("sgl-npu-theme", theme); } catch { /* no storage */ }
  };
  const nextTheme = () => setTheme(themes[(themes.indexOf(theme) + 1) % themes.length]);
  try { setTheme(localStorage.getItem("sgl-npu-theme")); } catch { setTheme("auto"); }
  button.addEventListener("click", nextTheme);

  const table = byId("sites");
  if (!table) return;
  const rows = [...table.tBodies[0].rows];
  const detail = byId("detail");
  const around = byId("around");
  const text = byId("filter");
  const choices = { layer: byId("module"), op: byId("op") };
  let current = null;

  const content = (number) => byId(`part-${number}`).content.cloneNode(true);

  const select = (row, focus) => {
    if (current) { current.setAttribute("aria-selected", "false"); current.tabIndex = -1; }
    current = row;
    row.setAttribute("aria-selected", "true");
    row.tabIndex = 0;
    if (focus) row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
    const title = document.createElement("div");
    title.className = "title";
    const name = document.createElement("h2");
    name.textContent = row.cells[1].textContent;
    const source = document.createElement("span");
    source.className = "muted";
    source.textContent = `site ${row.cells[0].textContent}${row.dataset.source ? ` · ${row.dataset.source}` : ""}`;
    title.append(name, source);
    detail.replaceChildren(title, content(row.dataset.detail));
    around.replaceChildren(...detail.querySelectorAll(".around"));
    around.hidden = !around.hasChildNodes();
    for (const place of document.querySelectorAll("main [data-part]")) {
      place.append(content(place.dataset.part));
      const attention = place.querySelector(".attention");
      if (attention) place.scrollTop = attention.offsetTop - place.offsetTop - place.clientHeight / 2;
    }
  };

  const shown = () => rows.filter((row) => !row.hidden);

  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const all = `${row.textContent} ${row.dataset.op} ${row.dataset.source}`.toLowerCase();
      const chosen = Object.entries(choices).every(([key, box]) => !box.value || row.dataset[key] === box.value);
      row.hidden = !(chosen && words.every((word) => all.includes(word)));
    }
    const found = shown();
    byId("count").textContent = found.length === rows.length ? `${rows.length} attentions` : `${found.length} of ${rows.length} attentions`;
    byId("none").hidden = found.length > 0;
    if (found.length && found.indexOf(current) < 0) select(found[0], false);
  };

  const move = (event) => {
    const found = shown();
    const at = found.indexOf(current);
    const steps = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: found.length - 1, PageDown: at + 10, PageUp: at - 10, j: at + 1, k: at - 1 };
    if (!(event.key in steps) || !found.length) return false;
    select(found[Math.max(0, Math.min(found.length - 1, steps[event.key]))], true);
    return true;
  };

  table.addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (row) select(row, true);
  });
  text.addEventListener("input", filter);
  for (const box of Object.values(choices)) box.addEventListener("change", filter);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const writing = event.target.matches("input, select, textarea");
    const inTable = event.target.closest && event.target.closest("#sites");
    if (event.key === "/" && !writing) text.focus();
    else if (event.key === "t" && !writing) nextTheme();
    else if (event.key === "Escape" && event.target === text) { text.value = ""; filter(); if (current) current.focus(); }
    else if (event.key === "Escape" && (detail.contains(event.target) || around.contains(event.target))) current.focus();
    else if (event.key === "Enter" && inTable) { detail.focus({ preventScroll: true }); detail.scrollIntoView({ block: "nearest" }); }
    else if ((event.key === "ArrowDown" || event.key === "Enter") && event.target === text) { if (current) current.focus(); }
    else if (inTable || event.target === document.body) { if (!move(event)) return; }
    else return;
    event.preventDefault();
  });

  filter();
  const named = byId(location.hash.replace("#site=", "site-"));
  select(named || rows[0], false);
})();
