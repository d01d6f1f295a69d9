"use strict";

// Shows the mentions of one kind that hold every word of the search.
const cards = [...document.querySelectorAll(".card")];
const buttons = [...document.querySelectorAll("[data-filter]")];
const search = document.querySelector("#search");
const shown = document.querySelector("#shown");
let filter = "all";

function update() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const card of cards) {
    const text = card.querySelector(".said").textContent.toLowerCase();
    const isOfKind = filter === "all" || card.dataset.flags.split(" ").includes(filter);
    card.hidden = !isOfKind || !words.every((word) => text.includes(word));
  }
  for (const button of buttons) {
    button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
  }
  shown.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} shown`;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    filter = button.dataset.filter;
    update();
  });
}
if (search) {
  search.addEventListener("input", update);
  document.querySelector("#controls").hidden = false; // of no use without this script
  update(); // a browser may bring back what was typed before a reload
}
