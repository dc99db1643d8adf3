// Picks images on the page in a real browser, and prints what it answers, as JSON: node test.mjs URL IMAGE ...
//
// CHROMIUM names the browser (default /usr/bin/chromium), SCREENSHOT a file for a picture of the page.

import { chromium } from "playwright-core";

const [url, ...images] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 800, height: 900 } });
const problems = [];
page.on("pageerror", (error) => problems.push(String(error)));
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
await page.goto(url);
await page.waitForSelector('body:is([data-state="ready"], [data-state="failed"])', { timeout: 60_000 });
const answers = [];
for (const image of images) {
  await page.setInputFiles("#file", image);
  await page.waitForSelector('body:is([data-state="done"], [data-state="failed"])', { timeout: 60_000 });
  answers.push(
    await page.evaluate(() => ({
      state: document.body.dataset.state,
      text: document.getElementById("state").textContent,
      shown: Array.from(document.querySelectorAll("#classes td:first-child"), (cell) => cell.textContent),
      hidden: document.getElementById("answer").hidden,
      ...window.answer,
    })),
  );
  if (process.env.SCREENSHOT && answers.length === 1) await page.screenshot({ path: process.env.SCREENSHOT });
}
const first = await page.evaluate(() => ({ state: document.body.dataset.state, text: document.getElementById("state").textContent }));
console.log(JSON.stringify({ first, answers, problems }));
await browser.close();
