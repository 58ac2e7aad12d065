// The server's API: the key, answers as JSON, and streams of server-sent events.
const KEY = "edgekd-key";
let key = readKey();

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Kept for this tab only, and only until it is closed.
export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // storage is switched off; the key lasts as long as the page
  }
}

export function keyHeaders() {
  // Headers hold bytes; the server compares them with the key's UTF-8.
  const bytes = new TextEncoder().encode(key);
  return key ? { Authorization: `Bearer ${String.fromCharCode(...bytes)}` } : {};
}

export async function ask(path, { body, signal } = {}) {
  const headers = keyHeaders();
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const url = new URL(path, document.baseURI);
  const sent = body && JSON.stringify(body);
  const response = await fetch(url, { method, headers, body: sent, signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached; is it still running?");
  });
  if (response.ok) return response;
  throw new ApiError(response.status, await reason(response));
}

// Yields the JSON of every event, to [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The server ended the answer early.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new ApiError(0, part.error.message);
      yield part;
    }
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

// Shows a form for the key, and calls `retry` with a new one in place.
export function askKey(form, retry) {
  const field = form.querySelector("input");
  form.querySelector("[role=alert]").textContent = key ? "The server refused this key." : "";
  form.hidden = false;
  field.focus();
  form.onsubmit = (event) => {
    event.preventDefault();
    setKey(field.value.trim());
    field.value = "";
    form.hidden = true;
    retry();
  };
}
