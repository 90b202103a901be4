// Vercel AI SDK: @ai-sdk/openai and @ai-sdk/openai-compatible.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { MODEL, PROMPT, URL, refused, report, same, without } from "./calls.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const openai = createOpenAI({ baseURL: URL, apiKey: "none" });
const like = createOpenAICompatible({ name: "gptray", baseURL: URL, apiKey: "none" });

const text = async (model, more = {}) =>
  (await generateText({ model, prompt: PROMPT, maxRetries: 0, ...more })).text;

async function stream(model, more = {}) {
  const parts = [];
  const onError = ({ error }) => {
    throw error;
  };
  for await (const part of streamText({ model, prompt: PROMPT, maxRetries: 0, onError, ...more })
    .textStream)
    parts.push(part);
  return parts;
}

const calls = {};
for (const [name, model] of [["openai", openai.completion(MODEL)], ["compatible", like.completionModel(MODEL)]])
  Object.assign(calls, {
    [`default, ${name}`]: () => text(model),
    [`long, ${name}`]: () => text(model, { maxOutputTokens: 4096 }),
    [`stream, ${name}`]: () => stream(model),
    [`stop, ${name}`]: async () => without("e", await text(model, { stopSequences: ["e"] })),
    [`seed, ${name}`]: async () => same(await text(model, { seed: 7 }), await text(model, { seed: 7 })),
    [`greedy, ${name}`]: () => text(model, { temperature: 0, topP: 0.9 }),
  });
calls["logprobs, openai"] = async () =>
  (
    await generateText({
      model: openai.completion(MODEL),
      prompt: PROMPT,
      providerOptions: { openai: { logprobs: 2, logitBias: { 3: -100 } } },
    })
  ).text;
await report({
  ...calls,
  "responses, openai": () => refused(() => text(openai(MODEL))),
  "chat, openai": () => text(openai.chat(MODEL)),
  "chat, compatible": () => text(like.chatModel(MODEL)),
});
