// What every JavaScript client's script shares: its calls are made one by one and reported.
export const [URL, MODEL] = process.argv.slice(2);
export const PROMPT = "the cat sat";
export const PROMPTS = ["the cat", "on the mat", "a dog"];

// Print a JSON line per call: what it gave, or the error that it ended with.
export async function report(calls) {
  for (const [call, make] of Object.entries(calls)) {
    let said, ok;
    try {
      said = await make();
      ok = said !== undefined;
    } catch (error) {
      said = `${error.name}: ${error.message}`;
      ok = false;
    }
    console.log(JSON.stringify({ call, ok, said }));
  }
}

function check(holds, message) {
  if (!holds) throw new Error(message);
}

// The error of a call that an endpoint of completions cannot answer, if it says what can.
export async function refused(call) {
  try {
    await call();
  } catch (error) {
    check(error.message.includes("POST /v1/completions"), error.message);
    return `refused: ${error.message}`;
  }
  throw new Error("the call was answered");
}

export function same(first, second) {
  check(first === second, `${first} is not ${second}`);
  return first;
}

export function without(stop, text) {
  check(!text.includes(stop), `${stop} is in ${text}`);
  return text;
}

export function counted(number, found) {
  check(found.length === number, `${found.length} for ${number}`);
  return found;
}
