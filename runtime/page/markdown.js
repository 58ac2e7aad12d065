// A little Markdown, shown by making elements: no text of a model is ever parsed as HTML.
const FENCE = /^\s{0,3}```\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(\S.*)$/;
const BULLET = /^\s*[-*+]\s+(\S.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(\S.*)$/;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;

const shown = new WeakMap(); // the sources of the blocks that an element holds

// Shows `text` in `element`; only blocks that changed are made anew, so a selection survives.
export function render(element, text) {
  const blocks = readBlocks(text);
  const sources = blocks.map((block) => JSON.stringify(block));
  const before = shown.get(element) ?? [];
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same).map(makeBlock));
  shown.set(element, sources);
}

export function readBlocks(text) {
  const blocks = [];
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const [block, next] = readCode(lines, at) ?? readList(lines, at) ?? readText(lines, at);
    if (block) blocks.push(block);
    at = next;
  }
  return blocks;
}

function readCode(lines, start) {
  const fence = FENCE.exec(lines[start]);
  if (!fence) return null;
  let end = start + 1;
  while (end < lines.length && !/^\s{0,3}```\s*$/.test(lines[end])) end += 1;
  return [{ kind: "code", language: fence[1], text: lines.slice(start + 1, end).join("\n") }, end + 1];
}

function readList(lines, start) {
  const pattern = [BULLET, NUMBER].find((each) => each.test(lines[start]));
  if (!pattern) return null;
  const items = [];
  let end = start;
  for (; end < lines.length && pattern.test(lines[end]); end += 1) {
    items.push(pattern.exec(lines[end]).at(-1));
  }
  const first = pattern === NUMBER ? Number(NUMBER.exec(lines[start])[1]) : null;
  return [{ kind: "list", first, items }, end];
}

function readText(lines, start) {
  const heading = HEADING.exec(lines[start]);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, start + 1];
  if (!lines[start].trim()) return [null, start + 1];
  const isText = (line) =>
    line.trim() && ![FENCE, HEADING, BULLET, NUMBER].some((each) => each.test(line));
  let end = start + 1;
  while (end < lines.length && isText(lines[end])) end += 1;
  return [{ kind: "text", text: lines.slice(start, end).join("\n") }, end];
}

function makeBlock(block) {
  if (block.kind === "code") return makeCode(block);
  if (block.kind === "list") {
    const list = make(block.first === null ? "ul" : "ol");
    if (block.first !== null) list.start = block.first;
    list.append(...block.items.map((item) => make("li", inline(item))));
    return list;
  }
  // The page's own headings go to level 2.
  const tag = block.kind === "heading" ? `h${Math.min(6, block.level + 2)}` : "p";
  return make(tag, inline(block.text));
}

function makeCode({ language, text }) {
  const pre = make("pre", [make("code", [text])]);
  pre.tabIndex = 0; // it may scroll, which needs the keyboard too
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code in ${language}` : "Code");
  if (language) pre.dataset.language = language;
  return pre;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, code, strong, emphasis] = found;
    nodes.push(text.slice(end, found.index));
    if (code !== undefined) nodes.push(make("code", [code]));
    else if (strong !== undefined) nodes.push(make("strong", [strong]));
    else nodes.push(make("em", [emphasis]));
    end = found.index + whole.length;
  }
  return [...nodes, text.slice(end)];
}

function make(tag, children = []) {
  const element = document.createElement(tag);
  element.append(...children); // strings become text nodes
  return element;
}
