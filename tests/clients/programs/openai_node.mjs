// openai for Node: whole, streamed, errors, and a busy server's 429.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, part, home] = process.argv.slice(2);
const { default: OpenAI } = await import(pathToFileURL(createRequire(`${home}/`).resolve("openai")));
const PROMPT = "Once upon a time";
const tally = { prompt_tokens: 0, generation_tokens: 0, completions: 0 };

function add(completion) {
  tally.prompt_tokens += completion.usage.prompt_tokens;
  tally.generation_tokens += completion.usage.completion_tokens;
  tally.completions += 1;
  return completion;
}

async function use(client) {
  const model = (await client.models.list()).data[0].id;
  const asked = { model, prompt: PROMPT, max_tokens: 64, seed: 5 };
  const whole = add(await client.completions.create(asked));
  let text = "";
  const stream = await client.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    text += chunk.choices.map((choice) => choice.text).join("");
    if (chunk.usage) add(chunk);
  }
  assert.equal(text, whole.choices[0].text);
  const many = add(await client.completions.create({ model, prompt: [PROMPT, "Tom"], n: 2, max_tokens: 8 }));
  assert.deepEqual(many.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  console.log("whole, streamed, lists with n");
  await assert.rejects(
    client.completions.create({ model, prompt: PROMPT, temperature: 3 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
  await assert.rejects(
    client.completions.create({ model: "another", prompt: PROMPT }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
  console.log("errors: BadRequestError with param, NotFoundError");
}

async function beRefused(client) {
  const model = (await client.models.list()).data[0].id;
  const asked = { model, prompt: PROMPT, max_tokens: 60 };
  const crowd = (options) => Array.from({ length: 12 }, () => client.completions.create(asked, options));
  for (const answer of await Promise.all(crowd({ maxRetries: 20 }))) add(answer);
  const outcomes = await Promise.allSettled(crowd({ maxRetries: 0 }));
  for (const { value } of outcomes) if (value) add(value);
  const refused = outcomes.filter(({ reason }) => reason);
  assert.ok(refused.length > 0);
  for (const { reason } of refused) assert.ok(reason instanceof OpenAI.RateLimitError, reason);
  console.log("a full queue: RateLimitError without retries, every answer with them");
}

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
await (part === "busy" ? beRefused(client) : use(client));
console.log(JSON.stringify(tally));
