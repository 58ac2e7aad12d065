// The system prompt and how tokens are drawn; an empty field leaves the choice to the server.
const STORE = "edgekd-settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const form = document.getElementById("settings-form");

// What the request has besides its messages; null where a field is wrong, which is shown.
export function readSettings() {
  if (!form.reportValidity()) return null;
  const found = {};
  for (const name of NUMBERS) {
    const text = form.elements[name].value;
    if (text !== "") found[name] = Number(text);
  }
  return found;
}

export function systemPrompt() {
  return form.elements.system.value.trim();
}

export function areValid() {
  return form.checkValidity();
}

for (const [name, value] of Object.entries(load())) {
  if (form.elements[name] && typeof value === "string") form.elements[name].value = value;
}
form.addEventListener("input", save);
form.addEventListener("reset", () => setTimeout(save)); // the fields are emptied after this event
form.addEventListener("submit", (event) => event.preventDefault());

function save() {
  const values = [...NUMBERS, "system"].map((name) => [name, form.elements[name].value]);
  try {
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(values)));
  } catch {
    // storage is switched off; the settings last as long as the page
  }
}

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}
