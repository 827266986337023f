(() => {
  "use strict";

  // ---- theme: auto, light, dark
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  const toggle = document.getElementById("theme");
  const remember = { // a browser may keep nothing for a file
    get: () => { try { return localStorage.getItem("halfbyte-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("halfbyte-theme", value); } catch { /* not kept */ } },
  };
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    toggle.querySelector("span").textContent = theme;
  };
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % themes.length];
    setTheme(next);
    remember.set(next);
  });
  if (themes.includes(remember.get())) setTheme(remember.get());

  // ---- tables: sorting, filter, marks
  const compare = (a, b, numeric) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
  const sortBy = (table, index, header) => {
    const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    table.querySelectorAll("thead th").forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const numeric = header.classList.contains("number");
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [row.cells[index].dataset.order, row]);
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // what is not known comes last
      return sign * compare(a, b, numeric);
    });
    body.append(...keyed.map(([, row]) => row));
  };
  for (const section of document.querySelectorAll(".study")) {
    const table = section.querySelector("table:not(.plain)");
    if (!table) continue;
    const status = section.querySelector(".status");
    const rows = [...table.tBodies[0].rows];
    table.querySelectorAll("thead th").forEach((header, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      button.addEventListener("click", () => sortBy(table, index, header));
    });
    const label = section.querySelector(".filter");
    label.hidden = false;
    label.querySelector("input").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      status.textContent = words.length ? `${shown} of ${rows.length} checkpoints` : "";
    });
    table.addEventListener("click", (event) => {
      const mark = event.target.closest(".mark");
      if (!mark) return;
      const note = mark.getAttribute("aria-label");
      const again = status.textContent === note;
      const names = again ? [] : [mark.closest("tr").dataset.name, ...JSON.parse(mark.dataset.same)];
      status.textContent = again ? "" : note;
      rows.forEach((row) => row.classList.toggle("same", names.includes(row.dataset.name)));
    });
  }

  // ---- menus: a checkpoint that is chosen for one chart is chosen for all that have it
  const follow = (menu) => {
    for (const other of menu.closest(".study").querySelectorAll(`select[data-parameter="${menu.dataset.parameter}"]`)) {
      if (other.value === menu.value || ![...other.options].some((option) => option.value === menu.value)) continue;
      other.value = menu.value;
      other.dispatchEvent(new Event("change")); // does not bubble, so that it ends here
    }
  };
  document.addEventListener("change", (event) => { if (event.target.matches("select")) follow(event.target); });

  // ---- charts
  const unpack = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  // each format has its own tables: the menu offers those of the checkpoint that is shown
  const offerTables = (id, rows) => {
    const [checkpoint, table] = ["checkpoint_shown", "table_shown"].map((parameter) =>
      [...document.querySelectorAll("select")].find((menu) => menu.dataset.chart === id && menu.dataset.parameter === parameter));
    if (!checkpoint || !table) return;
    const offer = () => {
      const before = table.value;
      const known = [...new Set(rows.filter((row) => row.checkpoint === checkpoint.value).map((row) => row.table))];
      table.replaceChildren(...known.map((name) => new Option(name, name)));
      if (known.includes(before)) table.value = before;
      else table.dispatchEvent(new Event("change"));
    };
    checkpoint.addEventListener("change", offer);
    offer();
  };
  const read = (id) => document.getElementById(id).textContent;
  const draw = async () => {
    const { data, specs } = JSON.parse(await unpack(read("charts")));
    const script = document.createElement("script");
    script.textContent = await unpack(read("vega")); // the page's policy knows its hash
    document.head.append(script);
    const options = {
      actions: false, renderer: "svg", ast: true, defaultStyle: false,
      tooltip: { disableDefaultStyle: true },
    };
    for (const [id, spec] of Object.entries(specs)) {
      offerTables(id, data[id]);
      const menus = [...document.querySelectorAll("select")].filter((menu) => menu.dataset.chart === id);
      const chosen = Object.fromEntries(menus.map((menu) => [menu.dataset.parameter, menu.value]));
      for (const parameter of spec.params ?? []) if (parameter.name in chosen) parameter.value = chosen[parameter.name];
      const { view } = await window.vegaEmbed(`#${id}`, { ...spec, datasets: { ...spec.datasets, [id]: data[id] } }, options);
      menus.forEach((menu) => menu.addEventListener("change", () => view.signal(menu.dataset.parameter, menu.value).runAsync()));
    }
  };
  draw().then(() => { root.dataset.charts = "drawn"; }, (error) => {
    for (const chart of document.querySelectorAll(".chart:empty")) {
      const message = document.createElement("p");
      message.textContent = `This browser cannot draw the chart: ${error.message}`;
      chart.append(message);
    }
    console.error(error);
  });
})();
