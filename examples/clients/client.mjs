// OpenAI's own JavaScript client against `edgekd serve`: what works, each with a check.
//
//     edgekd serve student.gguf
//     npm ci && node client.mjs http://127.0.0.1:8080/v1
//
// Prints one line for each feature; exits with 1 where one fails. The part about tools is left
// out where the model's chat template knows no tools.

import assert from "node:assert/strict";
import OpenAI from "openai";

const messages = [{ role: "user", content: "The quick brown fox" }];
const answer = {
  type: "object",
  properties: { answer: { enum: ["yes", "no"] } },
  required: ["answer"],
  additionalProperties: false,
};
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

async function chat(client, model) {
  const reply = await client.chat.completions.create({ model, messages, max_tokens: 16 });
  assert.equal(reply.choices[0].message.role, "assistant");
  assert.ok(["stop", "length"].includes(reply.choices[0].finish_reason));
  const { prompt_tokens, completion_tokens, total_tokens } = reply.usage;
  assert.equal(total_tokens, prompt_tokens + completion_tokens);
}

async function stream(client, model) {
  const asked = { model, messages, max_tokens: 16, seed: 1 };
  const whole = await client.chat.completions.create(asked);
  const options = { stream: true, stream_options: { include_usage: true } };
  let text = "";
  let usage;
  for await (const part of await client.chat.completions.create({ ...asked, ...options })) {
    text += part.choices[0]?.delta.content ?? "";
    usage = part.usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
}

async function tools(client, model) {
  const asked = { model, messages, tools: [weather], max_tokens: 100 };
  const forced = { ...asked, tool_choice: "required" };
  const { message, finish_reason } = (await client.chat.completions.create(forced)).choices[0];
  const [call] = message.tool_calls;
  assert.equal(finish_reason, "tool_calls");
  assert.equal(call.function.name, "weather");
  assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
  const streamed = await client.chat.completions.stream(forced).finalChatCompletion();
  const [again] = streamed.choices[0].message.tool_calls;
  assert.ok(["Paris", "Rome"].includes(JSON.parse(again.function.arguments).city));
  const result = { role: "tool", tool_call_id: call.id, content: "rain" };
  const told = { ...asked, messages: [...messages, message, result] };
  const reply = await client.chat.completions.create(told);
  assert.equal(reply.choices[0].message.role, "assistant");
}

async function jsonSchema(client, model) {
  const form = { type: "json_schema", json_schema: { name: "answer", schema: answer } };
  const asked = { model, messages, response_format: form, max_tokens: 100 };
  const reply = await client.chat.completions.create(asked);
  assert.ok(["yes", "no"].includes(JSON.parse(reply.choices[0].message.content).answer));
}

async function logprobs(client, model) {
  const wanted = { logprobs: true, top_logprobs: 3, max_tokens: 8, temperature: 0 };
  const reply = await client.chat.completions.create({ model, messages, ...wanted });
  for (const token of reply.choices[0].logprobs.content) {
    assert.equal(token.top_logprobs.length, 3);
    assert.equal(token.logprob, token.top_logprobs[0].logprob);
  }
  const asked = { model, prompt: "The", logprobs: 2, max_tokens: 4 };
  const plain = await client.completions.create(asked);
  assert.equal(plain.choices[0].logprobs.tokens.length, plain.usage.completion_tokens);
}

async function stop(client, model) {
  const asked = { model, prompt: "The quick brown", max_tokens: 24, temperature: 0 };
  const { text } = (await client.completions.create(asked)).choices[0];
  const mark = text.slice(4, 9);
  const reply = (await client.completions.create({ ...asked, stop: [mark] })).choices[0];
  assert.equal(reply.text, text.slice(0, text.indexOf(mark)));
  assert.equal(reply.finish_reason, "stop");
}

async function seed(client, model) {
  const asked = { model, prompt: "The quick brown", max_tokens: 24, temperature: 1 };
  const texts = [];
  for (const number of [7, 7, 8]) {
    const reply = await client.completions.create({ ...asked, seed: number });
    texts.push(reply.choices[0].text);
  }
  assert.equal(texts[0], texts[1]);
  assert.notEqual(texts[1], texts[2]);
}

async function errors(client, model) {
  const expected = [
    [OpenAI.NotFoundError, { model: "no-such-model" }],
    [OpenAI.BadRequestError, { temperature: 9 }],
  ];
  for (const [kind, wrong] of expected) {
    const asked = client.chat.completions.create({ model, messages, ...wrong });
    await assert.rejects(asked, (error) => {
      return error instanceof kind && error.error.message.length > 0 && error.code.length > 0;
    });
  }
}

async function knowsTools(client, model) {
  try {
    await client.chat.completions.create({ model, messages, tools: [weather], max_tokens: 1 });
    return true;
  } catch (error) {
    if (error instanceof OpenAI.UnprocessableEntityError) return false;
    throw error;
  }
}

const [baseURL, apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const features = [chat, stream, jsonSchema, logprobs, stop, seed, errors];
if (await knowsTools(client, model)) features.push(tools);
for (const feature of features) {
  try {
    await feature(client, model);
    console.log(`${feature.name}: ok`);
  } catch (error) {
    console.log(`${feature.name}: FAILED, ${error}`);
    process.exitCode = 1;
  }
}
