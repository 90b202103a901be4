// openai (npm).
import OpenAI from "openai";
import { MODEL, PROMPT, PROMPTS, URL, counted, refused, report, same, without } from "./calls.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const create = (more = {}) => client.completions.create({ model: MODEL, prompt: PROMPT, ...more });
const text = async (more) => (await create(more)).choices[0].text;

async function stream(more = {}) {
  const parts = [];
  for await (const chunk of await create({ stream: true, ...more }))
    parts.push(chunk.choices.length ? chunk.choices[0].text : `usage ${chunk.usage.total_tokens}`);
  return parts;
}

await report({
  default: () => text(),
  long: () => text({ max_tokens: 4096 }),
  stream: () => stream(),
  usage: async () => (await stream({ stream_options: { include_usage: true } })).at(-1),
  prompts: async () => counted(3, (await create({ prompt: PROMPTS })).choices),
  stop: async () => without("e", await text({ stop: "e" })),
  logprobs: async () => (await create({ logprobs: 2 })).choices[0].logprobs,
  seed: async () => same(await text({ seed: 7 }), await text({ seed: 7 })),
  n: async () => counted(2, (await create({ n: 2 })).choices),
  models: async () => (await client.models.list()).data.map((model) => model.id),
  chat: async () => {
    const messages = [{ role: "user", content: PROMPT }];
    const answer = await client.chat.completions.create({ model: MODEL, messages });
    return answer.choices[0].message.content;
  },
  responses: () => refused(() => client.responses.create({ model: MODEL, input: PROMPT })),
});
