// Runs models in llama.cpp: node llama.mjs JOBS RESULTS. A job is a model, a context, prompts, and a number of tokens.
// Each prompt is continued with the likeliest tokens. The packages are in the folder INTEROP.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const entry = path.join(process.env.INTEROP, "node_modules", "node-llama-cpp", "dist", "index.js");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error });
const results = [];
for (const job of JSON.parse(fs.readFileSync(process.argv[2], "utf8"))) {
  const model = await llama.loadModel({ modelPath: job.model });
  for (const prompt of job.prompts) {
    const ids = model.tokenize(prompt, false);
    const context = await model.createContext({ contextSize: job.context, threads: 1 });
    const made = [];
    if (job.tokens > 0) {
      for await (const token of context.getSequence().evaluate(ids, { temperature: 0 })) {
        made.push(token);
        if (made.length >= job.tokens) break;
      }
    }
    results.push({ ids: Array.from(ids), back: model.detokenize(ids), made, text: model.detokenize(made) });
    await context.dispose();
  }
  await model.dispose();
}
fs.writeFileSync(process.argv[3], JSON.stringify(results));
process.exit(0);
