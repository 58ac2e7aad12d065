// What the server says of its memory; asked for only while there is something to see.
import { ask } from "./api.js";

const POLL_MS = 2000;
let timer = 0;

export function startMeters() {
  stopMeters();
  showMemory();
  timer = setInterval(showMemory, POLL_MS);
}

export function stopMeters() {
  clearInterval(timer);
}

export async function showMemory() {
  let text;
  try {
    text = await (await ask("metrics")).text();
  } catch {
    return; // the request that matters tells what is wrong
  }
  const value = (name) => Number(new RegExp(`^${name} (\\S+)$`, "m").exec(text)?.[1]);
  const held = value("edgekd_kv_tokens");
  const room = value("edgekd_kv_capacity_tokens");
  const bytes = value("edgekd_engine_resident_bytes");
  const meter = document.getElementById("kv");
  meter.max = room || 1;
  meter.value = held;
  document.getElementById("kv-text").textContent = `${count(held)} of ${count(room)} tokens`;
  document.getElementById("memory").textContent = bytes ? formatBytes(bytes) : "unknown";
}

export function count(number) {
  return number.toLocaleString("en");
}

function formatBytes(bytes) {
  const mib = bytes / 2 ** 20;
  return mib < 1024 ? `${mib.toFixed(0)} MiB` : `${(mib / 1024).toFixed(2)} GiB`;
}
