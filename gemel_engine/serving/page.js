"use strict";

const form = document.getElementById("question");
const state = document.getElementById("state");
const answer = document.getElementById("answer");
let selected = null; // the mention that was selected, in which text, at which offset in code points

const put = (id, text) => {
  document.getElementById(id).textContent = text;
};

const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));

const percent = (value) => `${(100 * value).toFixed(0)}%`;

const element = (name, ...parts) => {
  const made = document.createElement(name);
  made.append(...parts.filter((part) => part !== null));
  return made;
};

const muted = (text) => {
  const made = element("span", text);
  made.className = "muted";
  return made;
};

const base64 = async (file) => {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
};

const howDecided = (found) => {
  const parts = [];
  if (found.decided_by === "evidence") {
    parts.push("decided by the evidence of the knowledge base; the language model was not asked");
  } else if (found.certified) {
    parts.push("search complete: no other name scores higher. This does not say that the answer is right");
  } else {
    parts.push("search not complete: its budget was spent");
  }
  if (found.confidence !== null) {
    parts.push(`confidence ${percent(found.confidence)}`);
  }
  if (found.is_nil) {
    parts.push("probably no entity of this knowledge base");
  }
  return `${parts.join("; ")}.`;
};

const show = (found) => {
  put("entity", found.entity_name);
  document.getElementById("entity").append(" ", muted(found.entity_id));
  put("how", howDecided(found));
  const places = new Map();
  if (found.without_picture) {
    found.without_picture.candidates.forEach((other, place) => places.set(other.entity_id, place + 1));
  }
  for (const cell of document.querySelectorAll(".without")) {
    cell.hidden = !found.without_picture;
  }
  const rows = found.candidates.map((candidate) => {
    const cells = [
      element("td", candidate.name, muted(candidate.description ?? "")),
      element("td", number(candidate.score ?? candidate.bonus)),
      element("td", number(candidate.log_prob)),
      element("td", candidate.evidence.join("; ")),
    ];
    if (found.without_picture) {
      const place = places.get(candidate.entity_id);
      cells.push(element("td", place === undefined ? "–" : `place ${place}`));
    }
    return element("tr", ...cells);
  });
  document.getElementById("candidates").replaceChildren(...rows);
  const used = found.demonstrations.map((item) => element("li", item.text, " ", muted(`${item.mention} → ${item.name}`)));
  document.getElementById("demonstrations").replaceChildren(...used);
  put("prompt", found.prompt);
  answer.hidden = false;
};

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = form.elements.picture.files;
  state.textContent = "linking …";
  form.querySelector("button").disabled = true;
  answer.hidden = true;
  try {
    const question = { text: form.elements.text.value, mention: form.elements.mention.value };
    if (selected && selected.text === question.text && selected.mention === question.mention) {
      question.mention_start = selected.start;
    }
    if (file) {
      question.picture = await base64(file);
    }
    const started = performance.now();
    const response = await fetch("api/explain", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
    });
    const found = await response.json();
    if (!response.ok) {
      throw new Error(found.error ?? JSON.stringify(found.detail));
    }
    show(found);
    state.textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  } catch (error) {
    state.textContent = error.message;
  } finally {
    form.querySelector("button").disabled = false;
  }
});

form.elements.text.addEventListener("select", () => {
  const { value: text, selectionStart, selectionEnd } = form.elements.text;
  const mention = text.slice(selectionStart, selectionEnd).trim();
  const before = text.slice(0, text.indexOf(mention, selectionStart));
  selected = { text, mention, start: [...before].length };
  form.elements.mention.value = mention;
});
