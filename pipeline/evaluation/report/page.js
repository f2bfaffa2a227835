
"use strict";
// Words of a mark appear at once and on touch too; without this script they are the drawing's own tooltips.
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;
for (const title of document.querySelectorAll("svg title")) {
  const mark = title.parentNode;
  mark.dataset.tip = title.textContent;
  mark.setAttribute("aria-label", title.textContent);
  title.remove();
}
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect(), width = document.documentElement.clientWidth;
  const left = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, 4), width - tip.offsetWidth - 4);
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${box.top + scrollY - tip.offsetHeight - 6}px`;
});
// A click on a header sorts its table; numbers begin with the largest.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")], body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    head.classList.add("sorts");
    head.tabIndex = 0;
    const sort = () => {
      const number = (row) => (row.cells[column].dataset.key === undefined ? NaN : +row.cells[column].dataset.key);
      const words = [...body.rows].every((row) => Number.isNaN(number(row)));
      const upwards = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : words;
      const compare = (a, b) => {
        if (words) return a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
        const [x, y] = [number(a), number(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return (Number.isNaN(x) - Number.isNaN(y)) * (upwards ? 1 : -1);
        return x - y;
      };
      body.append(...[...body.rows].sort((a, b) => (upwards ? compare(a, b) : -compare(a, b))));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
