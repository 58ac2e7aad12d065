// The chat: a conversation, one answer at a time, and what the keys do.
import { ask, askKey, events } from "./api.js";
import { render } from "./markdown.js";
import { count, showMemory, startMeters, stopMeters } from "./meters.js";
import { areValid, readSettings, systemPrompt } from "./settings.js";

const RETRY_MS = 1000; // while the model loads
const NEAR_PX = 80; // so close to its end the log follows the answer

const at = (id) => document.getElementById(id);
const [log, prompt, send, stop, alert] = ["log", "prompt", "send", "stop", "alert"].map(at);
const messages = []; // the conversation, without the system prompt
let model = null; // its name, once the server is ready
let running = null; // the AbortController of the answer in the making

async function start() {
  say("Loading the model…");
  try {
    await ask("health");
    const [found] = (await (await ask("v1/models")).json()).data;
    showModel(found);
  } catch (error) {
    if (error.status === 401) return needKey(start);
    if (error.status !== 503) fail(error);
    setTimeout(start, RETRY_MS);
    return;
  }
  alert.textContent = "";
  send.disabled = false;
  say("Ready");
  showMemory();
  prompt.focus();
}

function showModel(found) {
  model = found.id;
  at("model").textContent = model;
  at("welcome-model").textContent = model;
  document.title = `${model} · edgekd`;
  if (found.meta) at("context").textContent = `${count(found.meta.n_ctx)} tokens of context.`;
}

async function submit() {
  const text = prompt.value.trim();
  if (!text || running || !model) return;
  if (!areValid()) showSettings(true);
  const settings = readSettings();
  if (!settings) return;
  alert.textContent = "";
  prompt.value = "";
  fitPrompt();
  const question = addTurn("user", "You");
  question.body.textContent = text;
  messages.push({ role: "user", content: text });
  const answer = addTurn("assistant", model);
  const error = await run(answer, settings);
  if (!error) return;
  // Nothing was said: the question goes back to where it can be sent again.
  if (messages.at(-1)?.content === text) messages.pop();
  question.turn.remove();
  answer.turn.remove();
  if (!prompt.value) prompt.value = text;
  fitPrompt();
  if (error.status === 401) needKey(submit);
  else fail(error);
}

// Streams one answer; returns the error of one that never began.
async function run(answer, settings) {
  const controller = new AbortController();
  const pace = { first: 0, last: 0, parts: 0, asked: performance.now() };
  let text = "";
  let end = null;
  let usage = null;
  let error = null;
  setRunning(controller);
  const paint = throttled(() => keepInView(() => showAnswer(answer, text, pace)));
  try {
    const body = { messages: conversation(), stream: true, ...settings };
    body.stream_options = { include_usage: true };
    const response = await ask("v1/chat/completions", { body, signal: controller.signal });
    for await (const part of events(response)) {
      const choice = part.choices[0];
      usage = part.usage ?? usage;
      end = choice?.finish_reason ?? end;
      if (!choice?.delta.content) continue;
      text += choice.delta.content;
      note(pace);
      paint();
    }
  } catch (caught) {
    if (!controller.signal.aborted) error = caught;
  }
  if (running !== controller) return null; // a new chat began meanwhile
  setRunning(null);
  if (error && !text) {
    say("Ready");
    return error;
  }
  messages.push({ role: "assistant", content: text });
  const how = ending(controller, error, end);
  keepInView(() => {
    render(answer.body, text || "(no text)");
    answer.note.textContent = [...facts(pace, usage), how].filter(Boolean).join(" · ");
  });
  if (error) fail(error);
  say(how || "Ready");
  return null;
}

function conversation() {
  const system = systemPrompt();
  return system ? [{ role: "system", content: system }, ...messages] : [...messages];
}

function ending(controller, error, end) {
  if (controller.signal.aborted) return "Stopped";
  if (error) return "Broken off";
  return end === "length" ? "Cut off at the limit of tokens" : "";
}

function note(pace) {
  pace.last = performance.now();
  pace.first ||= pace.last;
  pace.parts += 1;
}

// A part of a stream holds one token, or several where a character needs them all.
function rate(pace, tokens = pace.parts) {
  const seconds = (pace.last - pace.first) / 1000;
  return tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
}

function facts(pace, usage) {
  const tokens = usage?.completion_tokens ?? pace.parts;
  const wait = pace.first ? `first after ${((pace.first - pace.asked) / 1000).toFixed(2)} s` : "";
  return [`${count(tokens)} tokens`, rate(pace, tokens), wait];
}

function showAnswer(answer, text, pace) {
  render(answer.body, text);
  at("speed").textContent = rate(pace);
}

function setRunning(controller) {
  running = controller;
  const isRunning = controller !== null;
  log.setAttribute("aria-busy", String(isRunning)); // read out when it is whole
  document.body.classList.toggle("running", isRunning);
  stop.hidden = !isRunning;
  send.hidden = isRunning;
  at("speed").textContent = "";
  if (isRunning) {
    say("Answering…");
    startMeters();
  } else {
    stopMeters();
    showMemory();
  }
}

function addTurn(role, name) {
  const turn = document.createElement("article");
  const [heading, body, small] = ["h2", "div", "p"].map((tag) => document.createElement(tag));
  turn.className = `turn ${role}`;
  heading.textContent = name;
  heading.className = role === "user" ? "unseen" : "who";
  body.className = "body";
  small.className = "note";
  turn.append(heading, body, small);
  at("welcome").hidden = true;
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return { turn, body, note: small };
}

// Runs `change`; a reader who has scrolled up is left where they read.
function keepInView(change) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  change();
  if (follows) log.scrollTop = log.scrollHeight;
}

function throttled(paint) {
  let isAsked = false;
  const owner = running;
  return () => {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => {
      isAsked = false;
      if (running === owner) paint();
    });
  };
}

function newChat() {
  running?.abort();
  setRunning(null);
  messages.length = 0;
  for (const turn of log.querySelectorAll(".turn")) turn.remove();
  at("welcome").hidden = false;
  alert.textContent = "";
  say(model ? "Ready" : "Loading the model…");
  prompt.focus();
}

function needKey(retry) {
  say("The server asks for its API key");
  askKey(at("key-form"), retry);
}

function say(text) {
  at("status").textContent = text;
}

function fail(error) {
  alert.textContent = error.message;
}

function showSettings(isOpen) {
  at("settings").hidden = !isOpen;
  at("open-settings").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) at("system").focus();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function onEscape() {
  if (running) {
    running.abort();
    prompt.focus();
  } else if (at("settings").contains(document.activeElement)) {
    showSettings(false);
    at("open-settings").focus();
  }
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
stop.addEventListener("click", onEscape);
at("new").addEventListener("click", newChat);
at("open-settings").addEventListener("click", () => showSettings(at("settings").hidden));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") onEscape();
});

start();
