"use strict";
// Names are anybody's text: all of it goes into text nodes, none of it into markup.
(() => {
  const PAGE = 50;
  const byId = id => document.getElementById(id);
  const { models, memories, maps, commands } = JSON.parse(byId("data").textContent);
  const items = [];
  for (const [key, name, source, tokens, bytes, description, license, text, facts, only, maker] of memories)
    items.push({ kind: "memory", key, name, source, tokens, bytes, description, license, text, facts, only, maker });
  const routes = models.map(() => []);
  for (const [key, name, source, target, bytes, description, license, text, certificate, facts, tensors] of maps) {
    const map = { kind: "map", key, name, source, target, bytes, description, license, text, certificate, facts, tensors };
    routes[source].push(map);
    items.push(map);
  }

  // What a memory's source leads to: itself, and by each target the map that keeps most.
  const reached = new Map();
  function reaches({ source, text, maker }) {
    const which = `${source} ${text} ${maker}`;
    if (!reached.has(which)) {
      const best = new Map();
      for (const map of routes[source]) {
        // A latent is read by the map that made it; the figures of others say nothing of it.
        if (map.text !== text || (maker !== null && map.tensors !== maker)) continue;
        const before = best.get(map.target);
        if (!before || retention(map) > retention(before)) best.set(map.target, map);
      }
      reached.set(which, best);
    }
    return reached.get(which);
  }
  const retention = map => map.certificate ? map.certificate.retention[0] : -Infinity;
  const bestOf = item => item.kind === "map" ? retention(item)
    : reaches(item).most ??= Math.max(-Infinity, ...[...reaches(item).values()].map(retention));

  // Filters
  const plain = text => text.normalize("NFKC").toLowerCase();
  const haystack = item => item.haystack ??= plain([item.key, item.name, models[item.source],
    item.kind === "map" ? models[item.target] : "", item.license ?? "", item.description ?? ""].join("\n"));
  function fits(item, target) {
    if (item.kind === "map") return target === null || item.target === target;
    if (target === null || reaches(item).has(target)) return true;
    return item.only === null ? item.source === target : item.only === target;
  }
  function certified(item, target) {
    if (item.kind === "map") return item.certificate !== null;
    const best = reaches(item);
    const maps = target === null ? [...best.values()] : best.has(target) ? [best.get(target)] : [];
    return maps.some(map => map.certificate);
  }
  const ORDERS = {
    name: (a, b) => a.order < b.order ? -1 : a.order > b.order ? 1 : 0,
    retention: (a, b) => b.order - a.order,
    tokens: (a, b) => b.order - a.order,
    bytes: (a, b) => a.order - b.order,
    measured: (a, b) => a.order < b.order ? 1 : a.order > b.order ? -1 : 0,
  };
  const KEYS = {
    name: item => plain(item.name),
    retention: item => Math.max(bestOf(item), -9),
    tokens: item => item.tokens ?? -1,
    bytes: item => item.bytes,
    measured: item => item.certificate?.measured ?? "",
  };
  const number = id => byId(id).value === "" ? null : Number(byId(id).value);
  function chosen() {
    const words = plain(byId("text").value).split(/\s+/).filter(Boolean);
    const [kind, source, target] = [byId("kind").value, number("source"), number("target")];
    const [least, most, sure, sort] = [number("least"), number("most"), byId("certified").checked, byId("sort").value];
    const found = items.filter(item =>
      (kind === "" || item.kind === kind)
      && (source === null || item.source === source)
      && (least === null || item.tokens >= least)
      && (most === null || item.tokens <= most)
      && fits(item, target)
      && (!sure || certified(item, target))
      && words.every(word => haystack(item).includes(word)));
    if (!sort) return found;
    for (const item of found) item.order = KEYS[sort](item);
    return found.sort(ORDERS[sort]);
  }

  // What is shown
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter(child => child !== null));
    return made;
  }
  // Each name is a direction of its own: a word from right to left turns nothing around it.
  const name = text => element("bdi", {}, text);
  const percent = share => `${(100 * share).toFixed(1)}\u00a0%`;
  const points = ([mean, low, high]) =>
    [mean, low, high].map(x => `${x < 0 ? "−" : "+"}${Math.abs(100 * x).toFixed(1)}`);
  const count = n => n.toLocaleString("en");
  const size = bytes => bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB`
    : bytes >= 1e5 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e3).toFixed(1)} kB`;
  const ends = ([, low, high]) => `${(100 * low).toFixed(1)} … ${(100 * high).toFixed(1)}`;
  const badge = kind => element("span", { class: `badge ${kind}` }, kind);

  // A retention from 0 to 1, its interval, and what its cost buys without a memory.
  function scale([mean, low, high], control = null) {
    const bar = element("div", { class: "scale plain", "aria-hidden": "true" });
    const part = (look, from, to) => {
      const [left, right] = [from, to].map(x => 100 * Math.min(Math.max(x, 0), 1));
      const box = element("i", { class: look });
      box.style.left = `${left}%`;
      box.style.width = `${right - left}%`;
      bar.append(box);
    };
    part("kept", 0, mean);
    part("whisker", low, high);
    if (control !== null) part("control", control, control);
    part("mean", mean, mean);
    return bar;
  }

  // A claim is not bold, and says that it is one.
  const share = ({ retention, claimed }) => [
    element("span", { class: claimed ? "figure claimed" : "figure" }, percent(retention[0])), claimed ? " claimed" : ""];
  function worthOf(item) {
    if (item.kind === "memory") return routesOf(item);
    if (!item.certificate) return element("span", { class: "worth unknown" }, "not certified");
    const { retention, margin } = item.certificate;
    return element("span", { class: "worth" }, ...share(item.certificate),
      element("small", {}, ends(retention) + (margin ? `, margin ${points(margin)[0]}` : "")));
  }

  function headline(item) {
    const about = item.kind === "map"
      ? [name(models[item.source]), " → ", name(models[item.target]), ` · ${size(item.bytes)}`]
      : [name(models[item.source]), ` · ${count(item.tokens)} tokens · ${size(item.bytes)}`];
    const kind = item.kind === "map" ? "map" : item.only === null ? "memory" : "latent";
    return element("summary", {},
      element("span", { class: `chip ${item.kind}` }, kind),
      element("span", { class: "what" },
        element("span", { class: "title" }, name(item.name)),
        element("span", { class: "about" }, ...about)),
      worthOf(item));
  }

  const byRetention = item => [...reaches(item).values()].sort((a, b) => retention(b) - retention(a));
  function routesOf(item) {
    const best = byRetention(item);
    const [first] = best;
    if (!first) return element("span", { class: "worth unknown" }, "on ", name(models[item.only ?? item.source]), " alone");
    const more = best.length > 1 ? `, and ${best.length - 1} more` : "";
    const worth = first.certificate ? share(first.certificate) : [element("span", { class: "unknown" }, "not certified")];
    return element("span", { class: "worth" }, ...worth,
      element("small", {}, "on ", name(models[first.target]), more));
  }

  function facts(item) {
    const rows = [["ID", item.kind === "memory" ? item.key : null], ["licence", item.license ?? "none given"],
      ["bytes", count(item.bytes)], ...item.facts];
    if (item.kind === "memory") rows.splice(2, 0, ["text", item.text ? "in the file" : "left out"]);
    return element("dl", {}, ...rows.filter(row => row[1] !== null)
      .map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, name(`${value}`)))));
  }

  function table(label, columns, rows) {
    return element("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" },
      element("table", { "aria-label": label, class: "plans" },
        element("thead", {}, element("tr", {}, ...columns.map(column => element("th", { scope: "col" }, column)))),
        element("tbody", {}, ...rows.map(cells => element("tr", {}, ...cells.map(cell => element("td", {}, cell)))))));
  }
  const kept = ({ retention, claimed }) => {
    const cell = document.createDocumentFragment();
    cell.append(...share({ retention, claimed }), element("small", { class: "range" }, ends(retention)));
    return cell;
  };
  const both = (first, second) => {
    const cell = document.createDocumentFragment();
    cell.append(element("span", { class: "figure" }, first), element("small", { class: "range" }, second));
    return cell;
  };
  const measuredPlan = ([tokens, native, cost, kept, control, which, margin, recalled, recalledMargin], withFacts) => {
    const difference = figures => figures
      ? both(points(figures)[0], `${points(figures)[1]} … ${points(figures)[2]}`) : "none";
    const retained = document.createDocumentFragment();
    retained.append(scale(kept, control), both(percent(kept[0]), ends(kept)));
    const row = [count(tokens), native, `${Math.round(100 * cost)}\u00a0%`, retained,
      control === null ? "not measured" : both(percent(control), which), difference(margin)];
    if (withFacts) row.push(...recalled ? [both(percent(recalled[0]), ends(recalled)), difference(recalledMargin)] : ["", ""]);
    return row;
  };

  function certificateOf(certificate) {
    const { claimed, measured, hardware, texts, cases, tier, plans } = certificate;
    const withFacts = plans.some(plan => plan[7]);
    const says = element("p", {}, badge(claimed ? "claimed" : "measured"), ` on ${measured}, `,
      name(hardware || "hardware unknown"), `: ${texts}${cases ? `, ${count(cases)} facts` : ""}`,
      tier ? `; tier ${tier}` : "", claimed ? ". The word of whoever listed it, until its signature is checked." : ".");
    const columns = ["tokens", "plan", "cost", "retention", "best control", "margin, points"];
    if (withFacts) columns.push("facts, of native", "their margin, points");
    return element("div", { class: claimed ? "certificate claims" : "certificate" }, element("h3", {}, "Certificate"), says,
      table("What each plan keeps", columns, plans.map(plan => measuredPlan(plan, withFacts))),
      element("p", { class: "note" }, "Bar: retention with its 95 % interval. Dotted: the best control, which is what the same "
        + "operations buy without a memory. The margin over it is what a memory is worth."));
  }

  function routesTable(item) {
    const best = byRetention(item);
    const own = item.only === null ? ["On ", name(models[item.source]), " itself it is an exact copy. "]
      : ["On ", name(models[item.only]), " alone, by the map that made it. "];
    const others = best.length ? "" : item.only === null ? "No map that is listed here leads elsewhere." : "That is not listed here.";
    return element("div", {}, element("h3", {}, "Where it can be read"),
      element("p", {}, ...own, others),
      best.length ? table("Targets", ["target", "map", "retention of the map alone"], best.map(map => [
        name(models[map.target]), name(map.name), map.certificate ? kept(map.certificate) : "not certified"])) : null);
  }

  function command(item) {
    const [before, after] = commands[item.kind];
    const text = before + item.key + after;
    const button = element("button", { type: "button" }, "Copy");
    const line = element("input", { type: "text", readonly: "", "aria-label": "Command", class: "command" });
    line.value = text;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        line.select(); // where the page may not write to the clipboard, the browser's own command
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      byId("count").textContent = "The command is copied.";
      setTimeout(() => { button.textContent = "Copy"; told(); }, 2000);
    });
    return element("p", { class: "copy" }, line, button);
  }

  function row(item) {
    const details = element("details", {}, headline(item));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return; // its inside is made when it is first opened
      details.append(element("div", { class: "inside" },
        item.description && element("p", {}, name(item.description)),
        command(item),
        item.kind === "map"
          ? item.certificate ? certificateOf(item.certificate) : element("p", {}, "Not certified: nothing was measured.")
          : routesTable(item),
        facts(item)));
    });
    return element("li", {}, details);
  }

  let found = [];
  let shown = 0;
  function more() {
    byId("items").append(...found.slice(shown, shown + PAGE).map(row));
    shown = Math.min(shown + PAGE, found.length);
    told();
  }
  function told() {
    byId("more").hidden = shown === found.length;
    const memories = found.filter(item => item.kind === "memory").length;
    const kinds = [[memories, "memory", "memories"], [found.length - memories, "map", "maps"]]
      .filter(([n]) => n).map(([n, one, many]) => `${count(n)} ${n === 1 ? one : many}`);
    byId("count").textContent = items.length === 0 ? "Nothing is listed here yet; awareness push does it."
      : found.length === 0 ? "Nothing fits: take a filter back."
      : kinds.join(" and ") + (shown < found.length ? `, the first ${count(shown)} shown` : "");
  }
  function update() {
    found = chosen();
    shown = 0;
    byId("items").replaceChildren();
    more();
  }

  const named = numbers => [...numbers].sort((a, b) => plain(models[a]) < plain(models[b]) ? -1 : 1)
    .map(i => element("option", { value: i }, models[i]));
  byId("source").append(...named(new Set(items.map(item => item.source))));
  byId("target").append(...named(new Set([...maps.map(map => map[3]), ...memories.map(m => m[9] ?? m[2])])));
  byId("filters").hidden = false;
  byId("filters").addEventListener("input", update);
  byId("filters").addEventListener("submit", event => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(update));
  byId("more").addEventListener("click", () => {
    const next = shown;
    more();
    byId("items").children[next]?.querySelector("summary").focus();
  });
  update();
})();
